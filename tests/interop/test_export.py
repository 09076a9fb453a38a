"""Exports through the command line, each loaded again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import exit_status
from drawn_images import draw_folder
from ranks import ROOT, run_ranks
from tiny_backbone import tiny_weights
from tiny_run import command

import streamtrain.interop.folder
from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.interop.load import load_weights


@pytest.fixture()
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_weights(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["hf", "timm", "safetensors"])
def test_each_format_is_written_and_overwritten(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "hf":
        pytest.importorskip("transformers", reason="transformers is not installed")
    for _ in range(2):
        assert exit_status(["export", "--weights", "weights", "--to", kind, "--out", "out"]) == 0
        assert capsys.readouterr().out.startswith("wrote out/model.safetensors (backbone of 0.0 M parameters")
    assert (place / "out" / "config.json").is_file() and not (place / "out" / "recipe.yaml").exists()
    assert load_weights(place / "out").config.model.dim == 32


def test_an_export_replaces_all_files_of_another_kind(place: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    (place / "out").mkdir()
    for kind in ("hf", "safetensors", "timm", "hf"):
        assert exit_status(["export", "--weights", "weights", "--to", kind, "--out", "out"]) == 0
        found = {path.name for path in (place / "out").iterdir()}
        cards = {"README.md", "preprocessor_config.json"} if kind == "hf" else set()
        assert found == {"config.json", "model.safetensors", *cards}


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_allows(umask: int, place: Path) -> None:
    before = os.umask(umask)
    try:
        for kind in ("timm", "safetensors"):
            assert exit_status(["export", "--weights", "weights", "--to", kind, "--out", kind]) == 0
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for kind in ("timm", "safetensors") for path in (place / kind).iterdir()}
    assert modes == {0o666 & ~umask} and (place / "timm").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_failed_export_leaves_the_earlier_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exit_status(["export", "--weights", "weights", "--to", "safetensors", "--out", "out"]) == 0
    before = {path.name: path.read_bytes() for path in (place / "out").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(streamtrain.interop.folder, "save_file", full)
    for out in ("out", "fresh"):
        assert exit_status(["export", "--weights", "weights", "--to", "timm", "--out", out]) == 2
    assert {path.name: path.read_bytes() for path in (place / "out").iterdir()} == before
    assert not (place / "fresh").exists()


def test_folders_of_other_origin_are_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "weights", place / "beside")
    (place / "beside" / "thesis.txt").write_text("precious")
    (place / "downloaded").mkdir()
    (place / "downloaded" / "config.json").write_text('{"model_type": "dinov3_vit"}')
    (place / "downloaded" / "model.safetensors").write_text("precious")
    for name in ("beside", "downloaded"):
        before = sorted(path.read_bytes() for path in (place / name).iterdir())
        assert exit_status(["export", "--weights", "weights", "--to", "timm", "--out", name]) == 2
        assert "not an earlier export" in capsys.readouterr().err
        assert sorted(path.read_bytes() for path in (place / name).iterdir()) == before


def test_errors_are_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("precious")
    (place / "file").write_text("x")
    for source, out, words in (
        (["--weights", "weights"], "mine", "not an earlier export"),
        (["--weights", "weights"], "file", "not an earlier export"),
        (["--weights", "weights"], "file/below", "cannot write file/below (Not a directory); choose another --out"),
        (["--run", "nowhere"], "out", "not a run directory"),
        ([], "out", "select the network"),
    ):
        assert exit_status(["export", *source, "--to", "safetensors", "--out", out]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert [path.name for path in (place / "mine").iterdir()] == ["thesis.txt"]


# growth of this process's private memory in bytes; the libraries are loaded before
GROWTH = """
import json, re, sys, threading
def resident():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
import streamtrain.interop.hf, streamtrain.interop.load, streamtrain.reporting.metrics, safetensors.torch
from transformers import DINOv3ViTModel
before, highest, over = resident(), 0, threading.Event()
def watch():
    global highest
    while not over.wait(0.005):
        highest = max(highest, resident())
watcher = threading.Thread(target=watch)
watcher.start()
from streamtrain.cli.main import main
code = main(["export", *sys.argv[1:]])
over.set()
watcher.join()
print(json.dumps({"code": code, "growth": highest - before}))
"""


@pytest.mark.slow
def test_checkpoint_of_two_ranks_is_exported_within_the_memory_of_its_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pack(draw_folder(tmp_path / "images", 12), tmp_path / "set", PackOptions())
    run = tmp_path / "run"
    large = ("run.steps=1", "model.dim=768", "model.depth=6", "model.num_heads=12")
    results = run_ranks(command(tmp_path / "set", run, *large), 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    trained = checkpoint.read_weights(run)
    for kind in ("hf", "timm", "safetensors"):
        out = tmp_path / kind
        done = subprocess.run(
            [sys.executable, "-c", GROWTH, "--run", str(run), "--to", kind, "--out", str(out)],
            capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout.splitlines()[-1])
        size = (out / "model.safetensors").stat().st_size
        assert result["code"] == 0 and size > 150e6 and result["growth"] < 1.2 * size, (kind, result["growth"] / size)
        assert (out / "recipe.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    for kind in ("hf", "safetensors"):
        state = load_weights(tmp_path / kind).model.state_dict()
        assert all(torch.equal(value, trained[f"backbone.{name}"]) for name, value in state.items())
    _, report = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    card = (tmp_path / "hf" / "README.md").read_text()
    digest = json.loads((tmp_path / "set" / "manifest.json").read_text())["digest"]
    for words in ("step: 1", f"data_digest: {digest}", "images_seen: 8", "loss/total: ", "recipe.yaml"):
        assert words in card
