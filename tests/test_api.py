"""The Python API: pack, train, load, embed and export from a notebook; errors are exceptions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from commands import ENVIRONMENT
from drawn_images import draw_folder, packed_set
from ranks import ROOT
from tiny_backbone import class_folder, tiny_weights

import streamtrain

HEAD = {"prototypes": 32, "hidden": 16, "bottleneck": 8}
SETTINGS = {
    "model": {"patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "drop_path": 0.0},
    "crops": {"global_size": 32, "local_size": 16, "local_count": 1},
    "objective": {"global_loss": {"head": HEAD}, "patch_loss": {"head": HEAD}},
    "data": {"micro_batch": 4, "lanes": 2, "decode_threads": 1},
    "engine": {"device": "cpu", "dtype": "fp32", "cpu_threads": 1},
}


def test_import_is_fast_and_loads_no_library() -> None:
    code = """
import sys, time
before = set(sys.modules)
began = time.perf_counter()
import streamtrain
assert time.perf_counter() - began < 0.1
assert not {"torch", "numpy", "pydantic", "yaml", "deepspeed"} & (set(sys.modules) - before)
assert streamtrain.__version__ and set(streamtrain.__all__) <= set(dir(streamtrain))
assert all(getattr(streamtrain, name) for name in streamtrain.__all__)
assert not {"torch", "deepspeed"} & set(sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_notebook_packs_trains_embeds_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_folder(tmp_path / "photos", 12)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [
        "import streamtrain",
        'streamtrain.pack("photos", "sets/photos", workers=1)',
        f'streamtrain.train("vits16.yaml", shards="sets/photos", run="runs/photos", gpus=1, steps=2, **{SETTINGS!r})',
        'backbone = streamtrain.load_backbone("runs/photos")',
        'features, keys = streamtrain.embed(backbone, "sets/photos")',
        'streamtrain.export("runs/photos", "exported", to="safetensors")',
        "print(features.dtype, features.shape, len(set(keys)))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert outputs[-1] == "float32 (12, 32) 12\n"
    assert "step" in outputs[2], "the progress of the ranks is not shown"
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_embed_keeps_the_order_of_the_set(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, 10, shard_bytes=6_000)
    backbone = streamtrain.load_backbone(tiny_weights(tmp_path / "weights"))
    features, keys = streamtrain.embed(backbone, shard_set.path, batch_size=3)
    assert features.shape == (10, 32) and features.dtype == np.float32 and len(np.unique(features, axis=0)) == 10
    places = [(shard, sample) for shard, size in enumerate(shard_set.sizes) for sample in range(size)]
    assert len({shard for shard, _ in places}) > 1
    assert keys == [shard_set.key(*place) for place in places]


def test_embed_files_takes_the_options_of_the_command(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, 7)
    weights = tiny_weights(tmp_path / "weights")
    out = streamtrain.embed_files(shard_set.path, tmp_path / "out", weights=weights, features=["mean", "cls"], batch=3)
    features, _ = streamtrain.embed(streamtrain.load_backbone(weights), shard_set.path, batch_size=3)
    assert np.allclose(np.load(out / "cls.npy"), features, atol=1e-6)
    assert np.load(out / "mean.npy").shape == (7, 32)
    with pytest.raises(streamtrain.StreamtrainError, match="unrecognized"):
        streamtrain.embed_files(shard_set.path, out, weights=weights, colour="cls")


def test_embed_leaves_out_unusable_images_with_their_keys(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, 12)
    offset = int(shard_set.records(0)["offset"][3])
    with open(shard_set.path / "shards" / "000000.tar", "r+b") as tar:
        tar.seek(offset)
        tar.write(bytes(8))
    backbone = streamtrain.load_backbone(tiny_weights(tmp_path / "weights"))
    features, keys = streamtrain.embed(backbone, shard_set.path)
    assert features.shape == (11, 32) and keys == [shard_set.key(0, sample) for sample in range(12) if sample != 3]


def test_verify_and_evaluate_return_what_the_commands_print(tmp_path: Path) -> None:
    class_folder(tmp_path / "images", each=10)
    streamtrain.pack(tmp_path / "images", tmp_path / "set", workers=1)
    assert streamtrain.verify(tmp_path / "set", workers=1) == []
    (tmp_path / "set" / "index" / "000000.idx").unlink()
    assert len(streamtrain.verify(tmp_path / "set", workers=1)) == 1
    result = streamtrain.evaluate("knn", train=tmp_path / "images", pixels=True, no_cache=True)
    assert result["features"] == "pixels" and result["test_images"] == 4 and 0 < result["margin_knn_10"] < 1
    for options, message in (({"pixle": 1}, "pixle"), ({"size": "many"}, "--size"), ({}, "select the network")):
        with pytest.raises(streamtrain.StreamtrainError, match=message):
            streamtrain.evaluate("knn", train=tmp_path / "images", **options)
    with pytest.raises(streamtrain.StreamtrainError, match="task 'nearest' is not one of"):
        streamtrain.evaluate("nearest", train=tmp_path / "images")
    weights = tiny_weights(tmp_path / "weights")
    for task in ("knn", "linear", "logistic"):
        if task == "logistic":
            pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        result = streamtrain.evaluate(task, train=tmp_path / "images", weights=weights, compare="pixels", no_cache=True)
        assert result["features"] == "weights" and result["compared_with"] == "pixels"


def test_a_failed_training_raises_its_error_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(streamtrain.TrainingError, match=r"^no shard set at nowhere"):
        streamtrain.train("vits16.yaml", shards="nowhere", run=tmp_path / "run", engine={"device": "cpu"})
    with pytest.raises(streamtrain.TrainingError, match=r"did you mean model\.depth"):
        streamtrain.train("vits16.yaml", shards="nowhere", run=tmp_path / "run", **{"model.dpeth": 3})
    assert "error: no shard set at nowhere" in capfd.readouterr().out
