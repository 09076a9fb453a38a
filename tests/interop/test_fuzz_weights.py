"""Any bytes as weights are loaded or refused in one line, in bounded time and memory, and run no code."""

from __future__ import annotations

import json
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_backbone import tiny_backbone

from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import export_safetensors
from streamtrain.interop.load import load_weights
from streamtrain.interop.load_pretrained import load_pretrained_backbone
from streamtrain.interop.timm_folder import export_timm

BACKBONE = tiny_backbone()
SHAPES = {name: value.shape for name, value in BACKBONE.model.state_dict().items()}
MAX_SECONDS, MAX_GROWTH = 10.0, 1 << 30


def check(path: Path) -> None:
    """Open ``path`` in both ways; raises anything but StreamtrainError, and fails on slow or large attempts."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for attempt in (lambda: start_from(path), lambda: load_weights(path)):
        try:
            attempt()
        except StreamtrainError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000 and str(error).isprintable()
    assert time.process_time() - began < MAX_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_GROWTH


def start_from(path: Path) -> None:
    with load_pretrained_backbone(path, SHAPES, 0.5) as (read, _):
        for name in SHAPES:
            read(name)


def write_zip(folder: Path) -> Path:
    torch.save({"teacher": BACKBONE.model.state_dict(), "epoch": 3}, folder / "zip.pth")
    return folder / "zip.pth"


def write_old(folder: Path) -> Path:
    torch.save({"model": BACKBONE.model.state_dict()}, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def write_safetensors(folder: Path) -> Path:
    export_safetensors(BACKBONE.model, BACKBONE.config, folder / "own")
    return folder / "own" / "model.safetensors"


@st.composite
def edits(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a copy of ``content`` with a few bytes replaced, removed, repeated or cut; headers are hit most often."""
    for _ in range(draw(st.integers(1, 4))):
        ends = st.integers(0, min(len(content), 4000)) | st.integers(max(0, len(content) - 6000), len(content))
        place = draw(ends | st.integers(0, len(content)))
        length = draw(st.sampled_from([0, 1, 2, 8, 100, len(content)]))
        new = draw(st.binary(max_size=12) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"9" * 20, content[:50]]))
        content = content[:place] + new + content[place + length :]
    return content


@pytest.mark.parametrize("write", [write_zip, write_old, write_safetensors])
@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_edited_files(write: Callable[[Path], Path], count: int, tmp_path: Path) -> None:
    source = write(tmp_path)
    content = source.read_bytes()
    check(source)

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(edits(content))
    def attempt(edited: bytes) -> None:
        (tmp_path / f"edited{source.suffix}").write_bytes(edited)
        check(tmp_path / f"edited{source.suffix}")

    attempt()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6)
    | st.sampled_from([0, -1, 1, 8, 32, 10**12, 1e300, "model", "../../etc/passwd", "model.safetensors", "a\0b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


def replace_value(document: Any, path: list[int], value: object) -> Any:
    """Return ``document`` with one value replaced; ``path`` picks an item at each level."""
    if not path or not isinstance(document, dict | list) or not document:
        return value
    keys = sorted(document) if isinstance(document, dict) else range(len(document))
    key = keys[path[0] % len(keys)]
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[key] = replace_value(document[key], path[1:], value)
    return copy


@pytest.mark.parametrize("kind", ["own", "timm", "hf", "index", "header"])
@pytest.mark.parametrize("count", [80, pytest.param(2000, marks=pytest.mark.slow)])
def test_edited_documents(kind: str, count: int, tmp_path: Path) -> None:
    folder = tmp_path / kind
    (export_timm if kind == "timm" else export_safetensors)(BACKBONE.model, BACKBONE.config, folder)
    path = folder / "config.json"
    document = json.loads(path.read_text())
    weights = (folder / "model.safetensors").read_bytes()
    if kind == "hf":
        sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        document = {"model_type": "dinov3_vit", **sizes, "patch_size": 8, "image_size": 32, "use_gated_mlp": False}
    elif kind == "index":
        path = folder / "model.safetensors.index.json"
        document = {"metadata": {}, "weight_map": dict.fromkeys(SHAPES, "model.safetensors")}
    elif kind == "header":
        size = int.from_bytes(weights[:8], "little")
        document = json.loads(weights[8 : 8 + size])

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, 60), min_size=1, max_size=4), JSON)
    # the width of the hf document beyond 64 bits
    @example([0], 2**63)
    def attempt(places: list[int], value: object) -> None:
        text = json.dumps(replace_value(document, places, value)).encode()
        if kind == "header":
            (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + weights[8 + size :])
        else:
            path.write_bytes(text)
        check(folder)
        check(folder / "model.safetensors")

    attempt()


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_no_code_of_a_file_runs(protocol: int, tmp_path: Path) -> None:
    content = pickle.dumps({"model": Attack(tmp_path / "ran")}, protocol)
    (tmp_path / "plain.pth").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(StreamtrainError) as caught:
            start_from(tmp_path / name)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_bombs_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 28))
    cycle: dict[str, Any] = {}
    cycle["model"] = cycle
    torch.save(cycle, tmp_path / "cycle.pth")
    shared: Any = {"x": 1}
    for _ in range(60):
        shared = {"a": shared, "b": shared, "c": [shared, shared]}
    torch.save(shared, tmp_path / "shared.pth")
    torch.save({f"model{index}.{name}": torch.zeros(1) for index in range(100) for name in list(SHAPES)[:6]},
               tmp_path / "many.pth")  # fmt: skip
    os.mkfifo(tmp_path / "fifo.pth")
    for name in ("deflated.pth", "cycle.pth", "shared.pth", "many.pth", "fifo.pth"):
        check(tmp_path / name)
        with pytest.raises(StreamtrainError):
            start_from(tmp_path / name)
