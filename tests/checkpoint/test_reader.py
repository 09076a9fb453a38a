"""Checkpoints written by any number of ranks are read in fragments of any span."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sealed import seal

from streamtrain.checkpoint import reader as checkpoint
from streamtrain.engine.fragments import Fragment
from streamtrain.errors import CheckpointError

SHAPES = {"backbone.a": (3, 7), "backbone.b": (5,), "head.c": (1,)}


def value(name: str) -> torch.Tensor:
    return torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float32).reshape(SHAPES[name]) + len(name)


def write(folder: Path, world_size: int) -> None:
    """Write a checkpoint of ``world_size`` ranks with the safetensors library."""
    folder.mkdir(parents=True)
    for rank in range(world_size):
        tensors = {}
        for name in SHAPES:
            flat = value(name).flatten()
            numel = -(-len(flat) // world_size)
            padded = torch.nn.functional.pad(flat, (0, numel * world_size - len(flat)))
            tensors[f"ema/{name}"] = padded[rank * numel : (rank + 1) * numel].clone()
        save_file(tensors, folder / f"rank-{rank:05d}-of-{world_size:05d}.safetensors")
    save_file({}, folder / "shared.safetensors")
    state = {"version": checkpoint.VERSION, "step": 7, "world_size": world_size, "shapes": SHAPES}
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)


@settings(max_examples=30, deadline=None)
@given(world_size=st.integers(1, 6), data=st.data())
def test_any_fragment_from_any_number_of_ranks(
    world_size: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    write(checkpoint.step_folder(run, 7), world_size)
    with checkpoint.open_checkpoint(checkpoint.step_folder(run, 7)) as reader:
        for name in SHAPES:
            flat = value(name).flatten()
            start = data.draw(st.integers(0, len(flat)))
            stop = data.draw(st.integers(start, len(flat)))
            padding = data.draw(st.integers(0, 3))
            expected = torch.nn.functional.pad(flat[start:stop], (0, padding))
            fragment = Fragment(SHAPES[name], start, stop, stop - start + padding)
            assert torch.equal(reader.read(f"ema/{name}", fragment), expected)
    weights = checkpoint.read_weights(run)
    assert all(torch.equal(weights[name], value(name)) for name in SHAPES)


@pytest.mark.parametrize("damage", ["missing", "truncated", "header", "garbage"])
def test_damaged_file_is_a_one_line_error(damage: str, tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 7)
    write(folder, 2)
    path = folder / "rank-00001-of-00002.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-3], "header": content[:20], "garbage": b"\xff" * 64}[damage])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        checkpoint.read_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sides", [(3, 22), (2**40, 2**12), (2**52, 2**52)])
def test_shape_larger_than_the_file_is_an_error_before_allocation(sides: tuple[int, int], tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 7)
    write(folder, 2)
    state = json.loads((folder / "state.json").read_text())
    state["shapes"]["backbone.a"] = sides
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    with pytest.raises(CheckpointError, match=r"fewer values of ema/backbone\.a than its state\.json states"):
        checkpoint.read_weights(tmp_path)


def test_a_rank_opens_only_the_files_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.step_folder(tmp_path, 7)
    monkeypatch.setitem(SHAPES, "backbone.large", (200,))
    world_size = 200
    write(folder, world_size)
    # all but those of two ranks
    for rank in set(range(world_size)) - {0, 150}:
        (folder / checkpoint.rank_name(rank, world_size)).write_bytes(b"")
    with checkpoint.open_checkpoint(folder, is_verified=True) as reader:
        part = reader.read("ema/backbone.large", Fragment((200,), 150, 151, 1))
        assert torch.equal(part, value("backbone.large")[150:151])
        with pytest.raises(CheckpointError, match="cannot be read"):
            reader.read("ema/backbone.large", Fragment((200,), 151, 152, 1))


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "backbone.large", (100,))
    folder = checkpoint.step_folder(tmp_path, 7)
    write(folder, 100)
    with checkpoint.open_checkpoint(folder) as reader:
        for _ in range(2):
            assert torch.equal(reader.read_full("ema/backbone.large"), value("backbone.large"))
        names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert sum(name.startswith(str(folder)) for name in names) == checkpoint._MAX_OPEN_FILES
