"""Readers for ``fuzz.py``: the small files of a run directory, and weights of other programs."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults.mutations import mutate_bytes, mutate_document
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_backbone import tiny_backbone

from shards.reading.quarantine import Quarantine
from streamtrain.checkpoint.retention import best_value, read_best
from streamtrain.evaluation import over_time
from streamtrain.evaluation.verdict import judge_learning, read_baselines
from streamtrain.interop.export import export_backbone
from streamtrain.interop.load import load_weights
from streamtrain.reporting.metrics import read_metrics, truncate_after

HERE = Path(tempfile.mkdtemp(prefix="fuzz-run-"))


@st.composite
def json_lines(draw: Callable[..., Any], documents: list[Any]) -> bytes:
    """Lines of JSON, some changed, torn, or followed by noise."""
    lines = [json.dumps(mutate_document(draw, document)).encode() for document in documents]
    if draw(st.integers(0, 5)) == 0:
        lines.insert(draw(st.integers(0, len(lines))), b"[" * draw(st.sampled_from([10, 5_000, 200_000])))
    content = b"\n".join(lines) + b"\n" * draw(st.integers(0, 1))
    return mutate_bytes(draw, content) if draw(st.booleans()) else content


METRICS = [{"step": step, "slot": 8 * step, "loss/total": 1.5, "eval/knn": None} for step in range(1, 6)]
ENTRY = {"slot": 3, "shard": "000000.tar", "index": 1, "key": "a", "stage": "read", "reason": "cannot be read"}
QUARANTINE = [{**ENTRY, "index": index, "stage": stage} for index in (1, 2) for stage in ("read", "decode")]


def read_metrics_file(content: bytes) -> None:
    path = HERE / "metrics.jsonl"
    path.write_bytes(content)
    records = list(read_metrics(path))
    truncate_after(path, 3)
    assert list(read_metrics(path)) == [record for record in records if record["step"] <= 3]


def read_quarantine(content: bytes) -> None:
    path = HERE / "quarantine.jsonl"
    path.write_bytes(content)
    quarantine = Quarantine(path)
    quarantine.is_unusable(3, "000000.tar", 1)


def read_best_file(content: bytes) -> None:
    (HERE / "best.json").write_bytes(content)
    best = read_best(HERE)
    assert best is None or isinstance(best["step"], int)
    best_value(HERE, "eval/knn", 9)


BASELINES = {
    "start": {"eval/knn_20": 0.5}, "pixels": {"eval/knn_20": 0.4}, "train_images": 8, "test_images": 2,
    "images": {"eval": "digest"}, "step": 3, "is_trained": True,
}  # fmt: skip


def read_baselines_file(content: bytes) -> None:
    (HERE / "baselines.json").write_bytes(content)
    known = read_baselines(HERE)
    judge_learning([{"step": 1, "eval/knn_20": 0.6}], "eval/knn_20", known, "untrained")


def make_maps() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, steps=np.arange(2), components=np.zeros((2, 1, 4, 4, 3), np.uint8), similarity=np.zeros((2, 1, 4)))
    return buffer.getvalue()


MAPS = make_maps()


@st.composite
def map_files(draw: Callable[..., Any]) -> bytes:
    return mutate_bytes(draw, MAPS)


def read_maps(content: bytes) -> None:
    (HERE / "maps.npz").write_bytes(content)
    over_time._load(HERE / "maps.npz", 1)


def make_weights() -> dict[str, bytes]:
    """Return an exported folder of a tiny backbone, and the same tensors as a torch file."""
    backbone = tiny_backbone()
    export_backbone(backbone, "safetensors", HERE / "exported")
    files = {path.name: path.read_bytes() for path in (HERE / "exported").iterdir()}
    tensors = backbone.model.state_dict()
    buffer = io.BytesIO()
    torch.save({"teacher": tensors, "epoch": 3}, buffer)
    return files | {"weights.pth": buffer.getvalue(), "plain.safetensors": save(tensors)}


@st.composite
def weights(draw: Callable[..., Any]) -> dict[str, bytes]:
    files = dict(WEIGHTS)
    name = draw(st.sampled_from(sorted(files)))
    if name.endswith(".json") and draw(st.booleans()):
        files[name] = json.dumps(mutate_document(draw, json.loads(files[name]))).encode()
    elif name.endswith(".safetensors") and draw(st.booleans()):
        size = int.from_bytes(files[name][:8], "little")
        header = json.dumps(mutate_document(draw, json.loads(files[name][8 : 8 + size]))).encode()
        files[name] = len(header).to_bytes(8, "little") + header + files[name][8 + size :]
    else:
        files[name] = mutate_bytes(draw, files[name])
    return {"name": name.encode(), **files}


def read_weights(files: dict[str, bytes]) -> None:
    files = dict(files)
    name = files.pop("name").decode()
    folder = HERE / "weights"
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    load_weights(folder / name if name.startswith(("weights", "plain")) else folder)


WEIGHTS = make_weights()
READERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "metrics": (lambda: json_lines(METRICS), read_metrics_file),
    "quarantine": (lambda: json_lines(QUARANTINE), read_quarantine),
    "best": (lambda: json_lines([{"step": 2, "metric": "eval/knn", "value": 0.5}]), read_best_file),
    "baselines": (lambda: json_lines([BASELINES]), read_baselines_file),
    "maps": (map_files, read_maps),
    "weights": (weights, read_weights),
}
