"""Runs with an augmentation and a model of the user's own: the files that docs/training.md shows, in another folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import exit_status
from drawn_images import draw_folder
from fork_server import start_forked
from PIL import Image
from ranks import ROOT, free_port
from tiny_backbone import class_folder, tiny_weights
from tiny_run import command, logged

import streamtrain
from shards.packing.pack import PackOptions, pack
from streamtrain.config.load import load_config
from streamtrain.config.user_code import load_user_code
from streamtrain.errors import StreamtrainError
from streamtrain.interop.load import load_untrained

OWN = ("data.augmentations=my_augment:cutout", "model.factory=my_model:Backbone")
# heads of 64 features, as the presets have
SETTINGS = (
    "run.steps=4", "data.micro_batch=2", "data.global_batch=8", "run.checkpoint_every=2", "model.dim=128",
    "evaluation.every=0",
)  # fmt: skip


def sources_of_the_docs() -> dict[str, str]:
    """Return the files that docs/training.md shows, by name."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    found = re.findall(r"Save this as `(my_\w+\.py)`:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in found] == ["my_augment.py", "my_model.py"]
    return dict(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working directory: a shard set, the files of the page, and faulty ones."""
    folder = tmp_path_factory.mktemp("own")
    pack(draw_folder(folder / "images", 24), folder / "set", PackOptions(shard_bytes=8_000))
    for name, text in sources_of_the_docs().items():
        (folder / name).write_text(text)
    class_folder(folder / "labelled", each=4)
    (folder / "late.py").write_text(
        "def fail(crops, generator):\n    if crops.float().mean() >= 0:\n        return crops.nothing\n"
    )
    return folder


def run_in(folder: Path, words: Sequence[object], ranks: int = 1) -> list[subprocess.CompletedProcess[str]]:
    """Run ``main.py`` on each rank in ``folder``, which is not on Python's path."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "PYTHONPATH": str(ROOT)}
    processes = [
        start_forked(words, {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, folder)
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(200) for process in processes]
        return [
            subprocess.CompletedProcess(list(words), process.wait(), *output)
            for process, output in zip(processes, outputs, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()


def train(folder: Path, run: str, *settings: str, ranks: int = 1) -> dict[int, dict[str, float]]:
    words = command(folder / "set", folder / run, *SETTINGS, *settings)
    for done in run_in(folder, words, ranks):
        assert done.returncode == 0, done.stderr[-3000:]
    return logged(folder / run)


def resumed(folder: Path, run: str, *settings: str, ranks: int = 1) -> dict[int, dict[str, float]]:
    """Resume a copy of a complete run that has lost its last checkpoint."""
    copy = folder / f"{run}-resumed"
    shutil.copytree(folder / run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000000004")
    (copy / "checkpoints" / "latest").write_text("step-000000002")
    return train(folder, copy.name, *settings, ranks=ranks)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    train(folder, "one", *OWN)
    return folder / "one"


def test_one_rank_resumes_bit_for_bit(folder: Path, trained: Path) -> None:
    straight = logged(trained)
    assert resumed(folder, "one", *OWN) == straight and list(straight) == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_ranks_resume_bit_for_bit_and_see_the_same_images(folder: Path, trained: Path) -> None:
    straight = train(folder, "two", *OWN, ranks=2)
    assert resumed(folder, "two", *OWN, ranks=2) == straight
    for step, record in logged(trained).items():
        assert straight[step] == pytest.approx(record, rel=1e-2, abs=1e-3), step


def test_both_keys_change_the_run(folder: Path, trained: Path) -> None:
    plain = logged(trained)
    assert train(folder, "only-model", OWN[1])[1] != plain[1]


def test_neither_key_may_change_silently(folder: Path, trained: Path) -> None:
    words = command(folder / "set", trained, *SETTINGS, "run.steps=6")
    for settings, message in (
        ([OWN[0]], "fixed settings differ from checkpoint"),
        ([OWN[1]], "--accept data.augmentations"),
    ):
        (done,) = run_in(folder, [*words, *settings])
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_change_of_the_code_is_a_warning(folder: Path, trained: Path) -> None:
    run_dir, path = folder / "edited", folder / "my_augment.py"
    shutil.copytree(trained, run_dir)
    before = path.read_text()
    words = command(folder / "set", run_dir, *SETTINGS, *OWN, "run.steps=5")
    try:
        path.write_text(before + "\n# edited\n")
        (done,) = run_in(folder, words)
    finally:
        path.write_text(before)
    assert done.returncode == 0, done.stderr
    assert "resuming with other versions: code of my_augment is " in done.stderr and "my_model" not in done.stderr


def test_the_network_is_loaded_with_permission_only(
    folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    with pytest.raises(StreamtrainError, match=r"own code, my_model:Backbone: if you have .*--factory my_model"):
        streamtrain.load_backbone(trained)
    assert "my_model" not in sys.modules
    backbone = streamtrain.load_backbone(trained, factory="my_model:Backbone")
    assert "embedding.projection.2.weight" in dict(backbone.model.named_parameters())

    factory = ["--factory", "my_model:Backbone"]
    export = ["export", "--run", trained, "--out", "exported"]
    assert exit_status([*export, "--to", "safetensors"]) == 2
    assert exit_status([*export, "--to", "safetensors", *factory]) == 0
    capsys.readouterr()
    for to in ("hf", "timm"):
        assert exit_status([*export[:-1], "other", "--to", to, *factory]) == 2
        assert capsys.readouterr().err.startswith(f"error: {to} has no network like my_model:Backbone")
    with pytest.raises(StreamtrainError, match="--factory my_model:Backbone"):
        streamtrain.load_backbone("exported")
    loaded = streamtrain.load_backbone("exported", factory="my_model:Backbone")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3)).astype(np.uint8)
    assert torch.equal(loaded(loaded.preprocess(images)).patches, backbone(backbone.preprocess(images)).patches)
    # its own parameters have been trained
    value = dict(loaded.model.named_parameters())["embedding.projection.2.weight"]
    assert 0 < (value - torch.eye(128)).abs().max() < 1

    for words in (["evaluate", "knn", "--train", folder / "labelled", "--size", "32"], ["visualize", "pca", "--image",
                  next((folder / "images").rglob("*.*")), "--out", "p.png"]):  # fmt: skip
        for source in (["--run", trained], ["--weights", "exported"], ["--run", trained, "--untrained"]):
            capsys.readouterr()
            assert exit_status([*words, *source]) == 2
            assert "--factory my_model:Backbone" in capsys.readouterr().err
    assert exit_status(["visualize", "pca", "--image", next((folder / "images").rglob("*.*")), "--out", "p.png",
                        "--weights", "exported", *factory]) == 0  # fmt: skip
    with pytest.raises(StreamtrainError, match="must be MODULE:NAME"):
        streamtrain.load_backbone(trained, factory="my_model.py")

    # of two compared networks, the factory is for the one that was trained with it
    built_in = tiny_weights(folder / "built_in")
    both = (["--run", trained], built_in), (["--weights", built_in], trained)
    for source, other in both:
        knn = ["evaluate", "knn", "--train", folder / "labelled", "--size", "32", *source, "--compare", other]
        assert exit_status([*knn, *factory]) == 0, capsys.readouterr().err
        assert f"compared with {other} on the same images" in capsys.readouterr().out
        assert exit_status(knn) == 2 and "--factory my_model:Backbone" in capsys.readouterr().err
    knn = ["evaluate", "knn", "--train", folder / "labelled", "--weights", built_in, "--compare", "pixels"]
    assert exit_status([*knn, *factory]) == 2 and "has a built-in network" in capsys.readouterr().err


def test_a_built_in_network_needs_no_factory(tmp_path: Path) -> None:
    weights = tiny_weights(tmp_path / "weights")
    with pytest.raises(StreamtrainError, match="has a built-in network, so it cannot be loaded with the factory a:b"):
        streamtrain.load_backbone(weights, factory="a:b")


def test_weights_of_an_own_network_start_another_run(folder: Path, trained: Path) -> None:
    words = command(folder / "set", folder / "next", *SETTINGS, *OWN, "run.steps=1", f"init.weights={trained}")
    (done,) = run_in(folder, words)
    assert done.returncode == 0, done.stderr
    assert "100.0% of the backbone's" in done.stdout


def test_a_failing_augmentation_ends_the_run_in_one_line(folder: Path) -> None:
    words = command(folder / "set", folder / "failing", *SETTINGS, "data.augmentations=late:fail")
    (done,) = run_in(folder, words)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "late:fail failed for slot" in errors[0] and "late.py, line 3)" in errors[0]
    assert "Traceback" not in done.stderr
    assert "return crops.nothing" in (folder / "failing" / "tracebacks.log").read_text()


@pytest.mark.parametrize("setting", ["data.augmentations=nowhere:f", "model.factory=my_model:Nothing"])
def test_a_refused_start_leaves_no_run_directory(folder: Path, setting: str) -> None:
    (done,) = run_in(folder, command(folder / "set", folder / "refused", *SETTINGS, setting))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {setting}: ") and done.stderr.count("\n") == 1
    assert not (folder / "refused").exists()


def test_pictures_of_crops_are_augmented(
    folder: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    image = next((folder / "images").rglob("*.*"))
    words = ["visualize", "crops", "--image", image, "--draws", "4", "--out", "crops.png"]

    def grey_pixels(*options: object) -> int:
        assert exit_status([*words, *options]) == 0, capsys.readouterr().err
        return int((np.asarray(Image.open("crops.png")) == 128).all(-1).sum())

    assert exit_status([*words, "--run", trained]) == 2
    assert "add data.augmentations=my_augment:cutout; add data.augmentations=null" in capsys.readouterr().err
    plain = grey_pixels("--run", trained, "data.augmentations=null")
    assert grey_pixels("--run", trained, OWN[0]) > plain + 500
    assert grey_pixels("--config", "quickstart.yaml", OWN[0]) > plain + 500


def test_a_teacher_of_another_person_chooses_no_code(folder: Path, trained: Path) -> None:
    words = command(
        folder / "set", folder / "distilled", *SETTINGS, "teacher.kind=frozen", f"teacher.weights={trained}"
    )
    (done,) = run_in(folder, words)
    assert done.returncode == 2 and "own code, my_model:Backbone, which can only teach a student" in done.stderr


def test_the_plan_counts_the_parameters(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    parameters = []
    for settings in ((), OWN):
        words = ["plan", "--config", "vits16.yaml", "--gpus", "1", "--gpu-memory", "80GB", "--json", *settings]
        assert exit_status(words) in (0, 1)
        parameters.append(json.loads(capsys.readouterr().out.splitlines()[-1])["num_parameters"])
    assert parameters[1] - parameters[0] == 384 * 384 + 384


@pytest.mark.slow
def test_the_command_starts_ranks_of_its_own(folder: Path) -> None:
    """``streamtrain train --ranks 2``, in processes that share nothing with the test."""
    words = command(folder / "set", folder / "launched", *SETTINGS, *OWN)[1:]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = str(ROOT)
    start = [sys.executable, "-m", "streamtrain.cli.main", "train", "--ranks", "2"]
    done = subprocess.run([*start, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert logged(folder / "launched")[4] == train(folder, "two-again", *OWN, ranks=2)[4]


def test_the_example_of_the_page_starts_as_the_built_in_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_user_code("model.factory", "my_model:Backbone", ("config",))
    backbone = load_untrained(load_config("vits16.yaml", [OWN[1], "model.depth=1"]))
    assert torch.equal(dict(backbone.model.named_parameters())["embedding.projection.2.weight"], torch.eye(384))
