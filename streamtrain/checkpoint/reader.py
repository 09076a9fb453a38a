"""Checkpoints: one folder a step, one safetensors file a rank, real only once it is renamed into place.

    checkpoints/step-000001000/rank-00000-of-00002.safetensors   fragments: master/NAME, exp_avg/NAME, ema/NAME
                              /shared.safetensors                what all ranks hold alike (softmax centres)
                              /state.json                        step, shapes, data position
                              /manifest.json                     size and checksum of each of these
    checkpoints/latest                                           name of the newest folder, for people
    snapshots/step-000001000/...                                 the same with ema/NAME alone

A fragment is the contiguous part of a flattened parameter that a rank owns, so that the files of any
number of ranks, laid end to end, are the parameter: any other number of ranks can read them. ``saver`` writes them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from shards.format.files import MAX_JSON_BYTES, parse_json, read_json
from streamtrain.checkpoint.retention import set_aside
from streamtrain.errors import CheckpointError
from streamtrain.run.atomic_io import ChecksummedFile, FileChecksum
from streamtrain.run.directory import SNAPSHOTS, STATE_NAME, candidates, saved_steps, step_folder
from streamtrain.run.step_manifest import find_fault

VERSION = 2
# more than have ever trained together
_MAX_RANKS = 1 << 20
SHARED_NAME = "shared.safetensors"
_KINDS = {"teacher": "ema", "student": "master"}


class Values(Protocol):
    """fp32 values ``[numel]`` that are made when they are read."""

    @property
    def numel(self) -> int: ...
    @property
    def read(self) -> Callable[[], torch.Tensor]: ...


class Piece(Protocol):
    """Which values of a flattened parameter are wanted: ``[start, stop)``, padded to ``numel``."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def numel(self) -> int: ...


class _FragmentFile:
    """One rank's file, read piece by piece.

    Its own library would map it into memory, where every page that was ever read counts as used.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            OSError, ValueError: if the file is missing, cut short or of another kind.
        """
        self._path, self._file = path, open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as this is
        size = int.from_bytes(self._file.read(8), "little")
        whole = os.fstat(self._file.fileno()).st_size
        if size > min(whole, MAX_JSON_BYTES):
            raise ValueError(f"{path.name} is no safetensors file")
        header = parse_json(self._file.read(size))
        try:
            header.pop("__metadata__", None)
            self.numels = {key: int(entry["shape"][0]) for key, entry in header.items()}
            spans = {key: (*map(int, entry["data_offsets"]),) for key, entry in header.items()}
            kinds = {entry["dtype"] for entry in header.values()}
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{path.name} has another header than those written here ({error!r})") from None
        self._offsets = {key: 8 + size + first for key, (first, _) in spans.items()}
        if kinds - {"F32"}:
            raise ValueError(f"{path.name} holds other numbers than fp32")
        for key, (first, end) in spans.items():
            if not 0 <= first == end - 4 * self.numels[key]:
                raise ValueError(f"{path.name} says of {key!r} what cannot be")
            if whole < 8 + size + end:
                raise ValueError(f"{path.name} is cut short")

    def read_into(self, values: torch.Tensor, key: str, offset: int) -> None:
        """Fill fp32 ``values [count]`` from those of ``key`` that begin at ``offset``."""
        memory, done = values.numpy().data.cast("B"), 0
        while done < len(memory):
            count = os.preadv(self._file.fileno(), [memory[done:]], self._offsets[key] + 4 * offset + done)
            if not count:
                raise CheckpointError(f"checkpoint file {self._path} is cut short")
            done += count

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass
class Reader:
    """An opened checkpoint: reads any piece of any parameter, whatever the number of ranks that wrote it."""

    folder: Path
    state: dict[str, Any]
    _files: list[_FragmentFile]
    _shard_numel: dict[str, int]

    @property
    def step(self) -> int:
        """Completed steps."""
        return int(self.state["step"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of parameter ``name``."""
        return tuple(self.state["shapes"][name])

    def has(self, key: str) -> bool:
        """Whether ``kind/name`` is there."""
        return key in self._shard_numel

    def read(self, key: str, piece: Piece) -> torch.Tensor:
        """``[piece.numel]``: the values ``[start, stop)`` of ``kind/name``, padded with zeros.

        Raises:
            CheckpointError: if the checkpoint does not hold them.
        """
        if key not in self._shard_numel:
            raise CheckpointError(f"{self.folder} holds no {key}: it belongs to another model or optimiser")
        numel = self._shard_numel[key]
        if piece.stop > numel * len(self._files):
            raise CheckpointError(f"{self.folder} holds fewer values of {key} than its {STATE_NAME} says")
        values = torch.zeros(piece.numel)
        position = piece.start
        while position < piece.stop:
            file, offset = divmod(position, numel)
            count = min(numel - offset, piece.stop - position)
            first = position - piece.start
            self._files[file].read_into(values[first : first + count], key, offset)
            position += count
        return values

    def whole(self, key: str) -> torch.Tensor:
        """The whole parameter ``kind/name`` in its shape."""
        shape = self.shape(key.partition("/")[2])
        count = math.prod(shape)
        return self.read(key, _Whole(count)).reshape(shape)

    def shared(self) -> dict[str, torch.Tensor]:
        """What all ranks hold alike."""
        try:
            return load_file(self.folder / SHARED_NAME)
        except (OSError, SafetensorError) as error:
            raise damaged(self.folder, error) from None


@dataclass(frozen=True)
class _Whole:
    numel: int
    start: int = 0

    @property
    def stop(self) -> int:
        return self.numel


def damaged(folder: Path, error: Exception | str) -> CheckpointError:
    """What to tell of a checkpoint that cannot be read."""
    return CheckpointError(f"checkpoint {folder} cannot be read: {error}; remove that folder to go on without it")


def agreed_fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None if it is; all ranks call it, each reads some of the files."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    faults: list[str | None] = [None] * world_size
    dist.all_gather_object(faults, find_fault(folder, contents=True, part=(rank, world_size)))
    return next((fault for fault in faults if fault is not None), None)


def newest_whole(run_dir: Path, resume_from: Path | None) -> Path | None:
    """The checkpoint to go on from, read to its end; all ranks call it and get the same. None at a fresh start.

    Damaged ones that are newer are told of, and, if they are the run's own, put out of the way of those to come.

    Raises:
        CheckpointError: if there are checkpoints and none is whole: that must not pass for a fresh start.
    """
    found: list[list[Path]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, candidates(run_dir, resume_from))
    faults: list[tuple[Path, str]] = []
    # as rank 0 sees them: on a network's file system others may see older names
    for folder in found[0]:
        fault = agreed_fault(folder)
        if fault is None:
            break
        faults.append((folder, fault))
    else:
        if faults:
            raise damaged(*faults[0])
        return None
    if dist.get_rank() == 0:
        for bad, fault in faults:
            kept = set_aside(bad) if bad.parent.parent == run_dir else bad
            print(f"warning: checkpoint {bad.name} is damaged: {fault}; it is kept as {kept}", flush=True)
        if faults:
            print(f"going on from {folder.name}, the newest whole one", flush=True)
    return folder


@contextmanager
def opened(folder: Path) -> Iterator[Reader]:
    """Open a checkpoint folder for the time of the ``with`` block; what its files hold is not compared with their sums.

    Raises:
        CheckpointError: if it is missing, damaged or of another format.
    """
    with ExitStack() as stack:
        try:
            if fault := find_fault(folder, contents=False):
                raise ValueError(fault)
            state = _checked(read_json(folder / STATE_NAME))
            world_size = state["world_size"]
            paths = [folder / rank_name(rank, world_size) for rank in range(world_size)]
            files = [stack.enter_context(closing(_FragmentFile(path))) for path in paths]
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(folder, error) from None
        yield Reader(folder, state, files, files[0].numels)


def _checked(state: Any) -> dict[str, Any]:
    """A ``state.json`` that says what one has to.

    Raises:
        ValueError, KeyError, TypeError: it does not.
    """
    if state["version"] != VERSION:
        raise ValueError(f"it has format {state['version']}, this program reads {VERSION}")
    step, world_size, shapes = state["step"], state["world_size"], state["shapes"]
    counts = [step, world_size, *(side for shape in shapes.values() for side in shape)]
    if not all(type(count) is int and 0 <= count < 2**53 for count in counts) or not 0 < world_size <= _MAX_RANKS:
        raise ValueError(f"{STATE_NAME} holds other numbers than are written there")
    return dict(state)


def latest_step(run_dir: str | Path) -> int | None:
    """The newest step with a whole checkpoint, or None."""
    steps = saved_steps(run_dir)
    return steps[-1] if steps else None


def read_weights(run_dir: str | Path, step: int | None = None, which: str = "teacher") -> dict[str, torch.Tensor]:
    """Whole fp32 parameters of a run's checkpoint, on CPU, by their names in ``SSLModel.state_dict()``.

    Args:
        step: completed steps; None is the newest.
        which: ``teacher`` (the average) or ``student`` (the masters).

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    return dict(iterate_weights(run_dir, step, which))


def iterate_weights(
    run_dir: str | Path, step: int | None = None, which: str = "teacher", wanted: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """As ``read_weights``, one parameter at a time; ``wanted(name)`` leaves out the others."""
    folder = weights_folder(run_dir, step, which)
    # whatever is made of the weights lasts longer than reading them once more
    if fault := find_fault(folder, contents=True):
        raise damaged(folder, fault)
    with opened(folder) as reader:
        for name in reader.state["shapes"]:
            if wanted is None or wanted(name):
                yield name, reader.whole(f"{_KINDS[which]}/{name}")


def weights_folder(run_dir: str | Path, step: int | None = None, which: str = "teacher") -> Path:
    """The checkpoint of ``step``, or the newest one, or where there is none of it the teacher's snapshot.

    Raises:
        CheckpointError: if there is neither.
    """
    steps = saved_steps(run_dir)
    snapshots = saved_steps(run_dir, SNAPSHOTS) if which == "teacher" else []
    if step is None and (steps or snapshots):
        step = (steps or snapshots)[-1]
    if step in steps:
        return step_folder(run_dir, step)
    if step in snapshots:
        return step_folder(run_dir, step, SNAPSHOTS)
    if step is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet")
    raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; there are {sorted({*steps, *snapshots})}")


def rank_name(rank: int, world_size: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def write_fragments(path: Path, shards: Mapping[str, Values]) -> FileChecksum:
    """A safetensors file: the length of the header, the header, the values (its library wants all at once).

    Raises:
        OSError: if it cannot be written.
    """
    header, offset = {}, 0
    for key, values in shards.items():
        header[key] = {"dtype": "F32", "shape": [values.numel], "data_offsets": [offset, offset + 4 * values.numel]}
        offset += 4 * values.numel
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with ChecksummedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, values in shards.items():
            tensor = values.read().detach().to("cpu", torch.float32).contiguous()
            assert tensor.shape == (values.numel,), key
            file.write(tensor.numpy().data)
        return file.finish()
