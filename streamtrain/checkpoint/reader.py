"""Reading checkpoints: one directory per step, one safetensors file per rank.

    checkpoints/step-000001000/rank-00000-of-00002.safetensors   fragments: master/NAME, exp_avg/NAME, ema/NAME;
                                                                 frozen/NAME: a value that teacher and student share
                              /shared.safetensors                values that are equal on all ranks (softmax centres)
                              /state.json                        step, shapes, data position
                              /manifest.json                     size and checksum of each of these files
    checkpoints/latest                                           name of the newest directory, for people
    snapshots/step-000001000/...                                 the same with ema/NAME and frozen/NAME only

A fragment is the contiguous part of a flattened parameter that a rank owns. The fragments of all ranks, concatenated,
are the parameter, so a run with any other number of ranks can read them. ``writer`` writes the files.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from shards.format.files import MAX_JSON_BYTES, parse_json, read_json
from streamtrain.checkpoint.retention import set_aside
from streamtrain.config.model import ADAPTERS, is_adapter
from streamtrain.engine.fragments import Fragment
from streamtrain.errors import CheckpointError
from streamtrain.ops.lora import Adapter, merge
from streamtrain.run.directory import SNAPSHOTS, STATE_NAME, candidates, check_step, saved_steps, step_folder
from streamtrain.run.step_manifest import find_fault

logger = logging.getLogger(__name__)
VERSION = 2
# an upper bound for the world size that a state.json may claim
_MAX_RANKS = 1 << 20
# of one reader at a time
_MAX_OPEN_FILES = 32
SHARED_NAME = "shared.safetensors"
_KINDS = {"teacher": "ema", "student": "master"}
_FROZEN = "frozen"


class _FragmentFile:
    """One rank's safetensors file, read with ``pread``: pages that the library maps would count as used memory."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            OSError, ValueError: if the file is missing, truncated or not such a file.
        """
        self._path, self._file = path, open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        size = int.from_bytes(self._file.read(8), "little")
        file_size = os.fstat(self._file.fileno()).st_size
        if size > min(file_size, MAX_JSON_BYTES):
            raise ValueError(f"{path.name} is not a safetensors file")
        header = parse_json(self._file.read(size))
        try:
            header.pop("__metadata__", None)
            self.numels = {key: int(entry["shape"][0]) for key, entry in header.items()}
            spans = {key: (*map(int, entry["data_offsets"]),) for key, entry in header.items()}
            dtypes = {entry["dtype"] for entry in header.values()}
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{path.name} has an invalid header ({error!r})") from None
        self._offsets = {key: 8 + size + first for key, (first, _) in spans.items()}
        if dtypes - {"F32"}:
            raise ValueError(f"{path.name} contains dtypes other than fp32")
        for key, (first, end) in spans.items():
            if not 0 <= first == end - 4 * self.numels[key]:
                raise ValueError(f"{path.name} has an invalid entry for {key!r}")
            if file_size < 8 + size + end:
                raise ValueError(f"{path.name} is truncated")

    def read_into(self, values: torch.Tensor, key: str, offset: int) -> None:
        """Fill fp32 ``values [count]`` with the values of ``key`` that begin at ``offset``."""
        if key not in self._offsets or offset + len(values) > self.numels[key]:
            raise CheckpointError(f"checkpoint file {self._path} lacks values of {key}")
        memory, done = values.numpy().data.cast("B"), 0
        while done < len(memory):
            count = os.preadv(self._file.fileno(), [memory[done:]], self._offsets[key] + 4 * offset + done)
            if not count:
                raise CheckpointError(f"checkpoint file {self._path} is truncated")
            done += count

    def close(self) -> None:
        self._file.close()


class CheckpointReader:
    """An open checkpoint: reads any fragment of any parameter, whatever the number of ranks that wrote it.

    Files are opened when they are needed, because each of many ranks needs only some.
    """

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        """``state``: a valid ``state.json``. Raises CheckpointError if the first file is missing or damaged."""
        self.folder, self.state = folder, state
        # the most recently used ones come last
        self._files: dict[int, _FragmentFile] = {}
        self._shard_numel = self._file(0).numels

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, rank: int) -> _FragmentFile:
        """Return the open file of a rank.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        file = self._files.pop(rank, None)
        if file is None:
            while len(self._files) >= _MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            try:
                file = _FragmentFile(self.folder / rank_name(rank, self.state["world_size"]))
            except (OSError, ValueError) as error:
                raise damage_error(self.folder, error) from None
        self._files[rank] = file
        return file

    @property
    def step(self) -> int:
        """Completed steps."""
        return int(self.state["step"])

    def has(self, key: str) -> bool:
        """Return whether the checkpoint contains ``kind/name``."""
        return self._stored_key(key) in self._shard_numel

    def _stored_key(self, key: str) -> str:
        """Return the key that stores ``kind/name``; teacher and student share the values of a frozen parameter."""
        kind, _, name = key.partition("/")
        is_frozen = kind in _KINDS.values() and f"{_FROZEN}/{name}" in self._shard_numel
        return f"{_FROZEN}/{name}" if is_frozen else key

    def read(self, key: str, fragment: Fragment) -> torch.Tensor:
        """Return ``[fragment.numel]``: the values ``[start, stop)`` of ``kind/name``, padded with zeros.

        Raises:
            CheckpointError: if the checkpoint lacks them.
        """
        key = self._stored_key(key)
        if key not in self._shard_numel:
            raise CheckpointError(f"{self.folder} does not contain {key}; it is from a different model or optimiser")
        numel = self._shard_numel[key]
        if fragment.stop > numel * self.state["world_size"]:
            raise CheckpointError(f"{self.folder} contains fewer values of {key} than its {STATE_NAME} states")
        values = torch.zeros(fragment.numel)
        position = fragment.start
        while position < fragment.stop:
            file, offset = divmod(position, numel)
            count = min(numel - offset, fragment.stop - position)
            first = position - fragment.start
            self._file(file).read_into(values[first : first + count], key, offset)
            position += count
        return values

    def read_full(self, key: str) -> torch.Tensor:
        """Return the full parameter ``kind/name`` in its shape."""
        shape = tuple(self.state["shapes"][key.partition("/")[2]])
        count = math.prod(shape)
        return self.read(key, Fragment(shape, 0, count, count)).reshape(shape)

    def read_merged(self, key: str) -> torch.Tensor:
        """Return the full parameter ``kind/name`` with its LoRA adapter merged into it, if it has one."""
        value, (layer, _, last) = self.read_full(key), key.rpartition(".")
        if last != "weight" or not self.has(f"{layer}.{ADAPTERS[0]}"):
            return value
        try:
            lora = self.state["config"]["model"]["lora"]
            scale = float(lora["alpha"]) / int(lora["rank"])
        except (LookupError, TypeError, ValueError, ZeroDivisionError):
            raise damage_error(self.folder, f"{STATE_NAME} lacks the settings of its LoRA adapters") from None
        a, b = (self.read_full(f"{layer}.{part}") for part in ADAPTERS)
        return merge(value, Adapter(a, b, scale))

    def read_shared(self) -> dict[str, torch.Tensor]:
        """Return the values that are equal on all ranks."""
        try:
            return load_file(self.folder / SHARED_NAME)
        except (OSError, SafetensorError) as error:
            raise damage_error(self.folder, error) from None


def damage_error(folder: Path, error: Exception | str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} cannot be read: {error}; delete this directory to resume without it")


def find_fault_on_any_rank(folder: Path) -> str | None:
    """Verify a checkpoint's files and return the first fault, or None; every rank calls this and reads some files."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    faults: list[str | None] = [None] * world_size
    dist.all_gather_object(faults, find_fault(folder, contents=True, part=(rank, world_size)))
    return next((fault for fault in faults if fault is not None), None)


def find_newest_intact(run_dir: Path, resume_from: Path | None) -> Path | None:
    """Return the newest checkpoint whose files are intact, or None without checkpoints; every rank calls this.

    Newer, damaged checkpoints are logged, and renamed if they are the run's own.

    Raises:
        CheckpointError: if every checkpoint is damaged, which must not become a fresh start.
    """
    by_rank: list[list[Path]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, candidates(run_dir, resume_from))
    faults: list[tuple[Path, str]] = []
    # use rank 0's list, since ranks may see different states of a network file system
    for folder in by_rank[0]:
        fault = find_fault_on_any_rank(folder)
        if fault is None:
            break
        faults.append((folder, fault))
    else:
        if faults:
            raise damage_error(*faults[0])
        return None
    if dist.get_rank() == 0:
        for damaged, fault in faults:
            path = set_aside(damaged) if damaged.parent.parent == run_dir else damaged
            logger.warning("checkpoint %s is damaged: %s; it is kept as %s", damaged.name, fault, path)
        if faults:
            logger.info("resuming from %s, the newest intact checkpoint", folder.name)
    return folder


@contextmanager
def open_checkpoint(folder: Path, is_verified: bool = False) -> Iterator[CheckpointReader]:
    """Open a checkpoint directory for a ``with`` block; sizes are checked, checksums are not.

    ``is_verified``: ``find_newest_intact`` has checked its files, which each of many ranks need not repeat.

    Raises:
        CheckpointError: if it is missing, damaged or has a different format.
    """
    try:
        if not is_verified and (fault := find_fault(folder, contents=False)):
            raise ValueError(fault)
        state = _validate(read_json(folder / STATE_NAME))
        check_step(folder, state)
    except CheckpointError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise damage_error(folder, error) from None
    with closing(CheckpointReader(folder, state)) as reader:
        yield reader


def _validate(state: Any) -> dict[str, Any]:
    """Return ``state.json`` if it is valid; raises ValueError, KeyError or TypeError if not."""
    if state["version"] != VERSION:
        raise ValueError(f"it has format {state['version']}, this program reads {VERSION}")
    step, world_size, shapes = state["step"], state["world_size"], state["shapes"]
    counts = [step, world_size, *(side for shape in shapes.values() for side in shape)]
    if not all(type(count) is int and 0 <= count < 2**53 for count in counts) or not 0 < world_size <= _MAX_RANKS:
        raise ValueError(f"{STATE_NAME} contains invalid numbers")
    return dict(state)


def read_weights(run_dir: str | Path, step: int | None = None, which: str = "teacher") -> dict[str, torch.Tensor]:
    """Read the full fp32 parameters of a run's checkpoint on the CPU, by their names in ``SSLModel.state_dict()``.

    Args:
        step: completed steps; None: the newest checkpoint.
        which: ``teacher`` (the EMA) or ``student`` (the masters).

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    return dict(iterate_weights(run_dir, step, which))


def iterate_weights(
    run_dir: str | Path, step: int | None = None, which: str = "teacher", wanted: Callable[[str], bool] | None = None,
    merged: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """Read parameters like ``read_weights``, one at a time, and only those for which ``wanted(name)`` is true.

    ``merged``: merge LoRA adapters into the weights and leave them out.
    """
    folder = weights_folder(run_dir, step, which)
    # verify checksums too: an export may outlive the checkpoint
    if fault := find_fault(folder, contents=True):
        raise damage_error(folder, fault)
    with open_checkpoint(folder) as reader:
        for name in reader.state["shapes"]:
            if (wanted is None or wanted(name)) and not (merged and is_adapter(name)):
                read = reader.read_merged if merged else reader.read_full
                yield name, read(f"{_KINDS[which]}/{name}")


def weights_folder(run_dir: str | Path, step: int | None = None, which: str = "teacher") -> Path:
    """Return the checkpoint of ``step`` (None: the newest), or if there is none, the teacher's snapshot.

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
    raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; available: {sorted({*steps, *snapshots})}")


def rank_name(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
