"""Writing checkpoints: one at a time, by a thread beside the training where the host has room for a copy of the values.

The copy, too, is made beside the training: what is saved does not change before the next optimiser step is applied, and
its forward and backward passes take longer than a copy.

All ranks write into a folder with a temporary name, tell one another how that went, and rank 0 renames the folder, or
removes it. Whatever a disk does (full, gone, read-only) is told as a warning; older checkpoints are not touched before
the new one is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save

from streamtrain.checkpoint.host_memory import available_bytes
from streamtrain.checkpoint.reader import SHARED_NAME, VERSION, Values, rank_name, write_fragments
from streamtrain.checkpoint.retention import partial_of, prune, remove_leftovers, write_best
from streamtrain.config.run import RunConfig
from streamtrain.errors import CheckpointError
from streamtrain.run.atomic_io import FileChecksum, replace_file, sync, write_file
from streamtrain.run.directory import CHECKPOINTS, METRICS_NAME, QUARANTINE_NAME, STATE_NAME, saved_steps, step_folder
from streamtrain.run.step_manifest import write_manifest

# of the memory that is free, what copies may take
_SHARE_OF_MEMORY = 0.8
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Contents:
    """What a step folder holds: each rank's own ``shards``, the rest being equal on all."""

    shards: Mapping[str, Values]
    shared: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of this rank's shards."""
        return sum(4 * values.numel for values in self.shards.values())


@dataclass(frozen=True)
class _Copied:
    """Values in memory that the training does not write to."""

    values: torch.Tensor

    @property
    def numel(self) -> int:
        return self.values.numel()

    def read(self) -> torch.Tensor:
        return self.values


class _Abandoned(Exception):
    """A save cannot be done, as all ranks know; says why."""


class Saver:
    """Saves the steps of a run; all ranks call every method alike."""

    def __init__(
        self, run_dir: Path, config: RunConfig, local_world_size: int = 1, timeout_seconds: float = 1800.0
    ) -> None:
        """Remove what a killed save has left.

        Args:
            local_world_size: ranks that share this host's memory.
            timeout_seconds: how long a rank waits for another one to write its part.
        """
        self._run_dir, self._config, self._local_world_size = run_dir, config, local_world_size
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # of its own, since this thread's messages must never meet the training's
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._thread: threading.Thread | None = None
        # whether the values that are being saved may change
        self._copied = threading.Event()
        self._copied.set()
        self._error: BaseException | None = None
        # warnings: of the save under way, and of those that have ended
        self._noted: list[str] = []
        self._told: list[str] = []
        # seconds: of the save under way, of the one that has ended, and that the training has waited
        self._seconds = self._took = self._stalled = 0.0
        # why there is no checkpoint of the last step that was to have one
        self.failure: str | None = None
        if self._rank == 0:
            remove_leftovers(run_dir)

    def save(
        self,
        step: int,
        contents: Mapping[str, Contents],
        ended: Callable[[], None] = lambda: None,
        best: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to write a folder of ``step`` in each place (``checkpoints``, ``snapshots``).

        The values must not change until ``copied`` has returned. A save that is still under way is waited for, so that
        there is never more than one copy of them.

        Args:
            contents: by place; one of them has all the shards that another one has.
            ended: called by rank 0 when the folders are whole, or given up.
            best: as for ``write_best``, where the checkpoint is the best so far.
        """
        self.wait()
        began = time.perf_counter()
        if self._config.save_in_background and self._has_room(contents):
            self._copied.clear()
            work = (step, contents, ended, began, best, _beside_the_device())
            self._thread = threading.Thread(target=self._run, args=work, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run(step, contents, ended, began, best)
            self._settle()
        self._stalled += time.perf_counter() - began

    def copied(self) -> None:
        """Wait until the values that are being saved may change."""
        if not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self._stalled += time.perf_counter() - began

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            RuntimeError: if the writing ended for other reasons than the disk's, such as another rank's end.
        """
        if self._thread is not None:
            began = time.perf_counter()
            self._thread.join()
            self._stalled += time.perf_counter() - began
            self._settle()

    def told(self) -> str:
        """What became of the last checkpoint, for the end of the run."""
        if self.failure is None:
            return "checkpoint saved"
        return f"its checkpoint could not be written ({self.failure}) and {self._newest(CHECKPOINTS)}"

    def scalars(self) -> dict[str, float]:
        """What is new since the last call, by tag: the seconds that training waited, and that a save took in all."""
        if self._thread is not None and not self._thread.is_alive():
            self._settle()
        found = {"speed/checkpoint_stall_seconds": self._stalled, "speed/checkpoint_seconds": self._took}
        self._stalled = self._took = 0.0
        return {tag: seconds for tag, seconds in found.items() if seconds}

    def warnings(self) -> list[str]:
        """What somebody should know of the saves that have ended since the last call."""
        found, self._told = self._told, []
        return found

    def close(self) -> None:
        """Wait, without a word: whoever closes after a failure has another one to tell."""
        if self._thread is not None:
            self._thread.join()

    def _settle(self) -> None:
        """Take over what the save that has ended has to tell."""
        self._thread = None
        self._took, self._seconds = self._seconds, 0.0
        self._told += self._noted
        self._noted = []
        if self._error is not None:
            raise RuntimeError("the thread that writes checkpoints has failed") from self._error

    def _has_room(self, contents: Mapping[str, Contents]) -> bool:
        """Whether this host has memory for a copy of what its ranks hold."""
        needed = self._local_world_size * max(each.num_bytes for each in contents.values())
        return needed < _SHARE_OF_MEMORY * available_bytes()

    def _run(
        self,
        step: int,
        contents: Mapping[str, Contents],
        ended: Callable[[], None],
        began: float,
        best: Mapping[str, Any] | None,
        beside: AbstractContextManager[Any] | None = None,
    ) -> None:
        """``beside``: where to copy the values first, if training goes on meanwhile."""
        try:
            if beside is not None:
                with beside:
                    contents = _copy(contents)
                self._copied.set()
            for place, each in contents.items():
                failure = None
                try:
                    self._write(step_folder(self._run_dir, step, place), step, each, best)
                except _Abandoned as reason:
                    failure = str(reason)
                    self._noted.append(
                        f"no {place.removesuffix('s')} of step {step} could be written: {failure}; it is tried again "
                        f"at the next interval; {self._newest(place)}"
                    )
                if place == CHECKPOINTS:
                    self.failure = failure
            if self._rank == 0:
                ended()
            self._seconds = time.perf_counter() - began
        except BaseException as error:
            self._error = error
        finally:
            self._copied.set()

    def _newest(self, place: str) -> str:
        try:
            steps = saved_steps(self._run_dir, place)
        except CheckpointError:
            steps = []
        return f"the newest is that of step {steps[-1]}" if steps else "there is none yet"

    def _write(self, folder: Path, step: int, contents: Contents, best: Mapping[str, Any] | None) -> None:
        partial = partial_of(folder)
        sizes = self._exchanged(contents.num_bytes)
        self._together(lambda: self._begin(partial, sum(sizes)) if self._rank == 0 else None)
        try:
            sums = self._together(lambda: self._write_files(partial, step, contents))
            files = {name: one for each in sums for name, one in each.items()}
            self._together(lambda: self._publish(partial, folder, files, best) if self._rank == 0 else None)
        except _Abandoned:
            if self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _begin(self, partial: Path, num_bytes: int) -> None:
        """Make the folder, if there is room for what will be in it."""
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(exist_ok=True)
        free = shutil.disk_usage(partial.parent).free
        if num_bytes > free:
            raise _Abandoned(f"it takes {num_bytes / 1e6:.3g} MB, and the disk has {free / 1e6:.3g} MB left")
        partial.mkdir()
        sync(self._run_dir)

    def _write_files(self, partial: Path, step: int, contents: Contents) -> dict[str, FileChecksum]:
        """Write this rank's files."""
        name = rank_name(self._rank, self._world_size)
        sums = {name: write_fragments(partial / name, contents.shards)}
        if self._rank == 0:
            sums[SHARED_NAME] = write_file(partial / SHARED_NAME, save(dict(contents.shared)))
            document = {"version": VERSION, "step": step, "world_size": self._world_size, "shapes": contents.shapes}
            text = json.dumps(document | dict(contents.state), indent=1)
            sums[STATE_NAME] = write_file(partial / STATE_NAME, text.encode())
        return sums

    def _publish(
        self, partial: Path, folder: Path, files: Mapping[str, FileChecksum], best: Mapping[str, Any] | None
    ) -> None:
        """Everything is written: let it be found, and what it replaces go."""
        write_manifest(partial, files)
        sync(partial)
        for name in (METRICS_NAME, QUARANTINE_NAME):
            # the history must not end before the checkpoint that goes on from it
            if (self._run_dir / name).exists():
                sync(self._run_dir / name)
        os.rename(partial, folder)
        try:
            sync(folder.parent)
            replace_file(folder.parent / "latest", f"{folder.name}\n".encode())
            if folder.parent.name == CHECKPOINTS:
                if best is not None:
                    write_best(self._run_dir, best)
                prune(self._run_dir, self._config)
        except OSError as error:
            # the checkpoint is there; the rest is convenience
            self._noted.append(f"{folder} is written, but not all that should follow: {_reason(error)}")

    def _together(self, work: Callable[[], _Result]) -> list[_Result]:
        """The results of all ranks' ``work``.

        Raises:
            _Abandoned: on all of them, if the disk of one has failed.
        """
        try:
            result, fault = work(), None
        except (OSError, _Abandoned) as error:
            result, fault = None, _reason(error)
        outcomes = self._exchanged((result, fault))
        for _, told in outcomes:
            if told is not None:
                raise _Abandoned(told)
        return [each for each, _ in outcomes]

    def _exchanged(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


def _beside_the_device() -> AbstractContextManager[Any]:
    """For a thread, a stream of its own that begins when the training's has done what it has; on a CPU nothing."""
    if not torch.cuda.is_initialized():
        return nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return _on(stream)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    # a thread begins on device 0, and would go back there afterwards: every rank would have a context there
    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield


@torch.no_grad()
def _copy(contents: Mapping[str, Contents]) -> dict[str, Contents]:
    """The same with all values in one new piece of host memory, however many places they go to."""
    largest = max(contents.values(), key=lambda each: each.num_bytes)
    memory, offset = torch.empty(largest.num_bytes // 4), 0
    copies: dict[str, Values] = {}
    for key, values in largest.shards.items():
        copy = memory.narrow(0, offset, values.numel)
        copy.copy_(values.read().detach())
        copies[key] = _Copied(copy)
        offset += values.numel
    return {
        place: replace(
            each,
            shards={key: copies[key] for key in each.shards},
            shared={key: value.detach().to("cpu", copy=True).contiguous() for key, value in each.shared.items()},
        )
        for place, each in contents.items()
    }
