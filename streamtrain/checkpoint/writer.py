"""Writing checkpoints: one at a time, in a background thread if host memory has room for a copy of the values.

The thread also makes the copy, during the forward and backward passes of the next step, which do not change the values
and take longer than the copy.

All ranks write into a directory with a temporary name and exchange the outcome; rank 0 then renames or removes it. Disk
errors (full, gone, read-only) are warnings; older checkpoints are kept until the new one is complete.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save

from shards.format.files import remove_tree, sync, write_whole
from streamtrain.checkpoint.reader import SHARED_NAME, VERSION, rank_name
from streamtrain.checkpoint.retention import finish_removal, partial_of, prune, publish, remove_leftovers, write_best
from streamtrain.config.run import RunConfig
from streamtrain.engine.fragments import Shard
from streamtrain.errors import CheckpointError
from streamtrain.planning.host import COPY_SHARE
from streamtrain.run.atomic_io import ChecksummedFile, FileChecksum, write_file
from streamtrain.run.directory import (
    CHECKPOINTS,
    METRICS_NAME,
    QUARANTINE_NAME,
    SNAPSHOTS,
    STATE_NAME,
    saved_steps,
    step_folder,
)
from streamtrain.run.machine import host_memory
from streamtrain.run.step_manifest import CheckpointManifest

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class CheckpointPayload:
    """Contents of a step directory; all but ``shards`` is equal on all ranks."""

    shards: Mapping[str, Shard]
    shared: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size of this rank's shards."""
        return sum(4 * shard.numel for shard in self.shards.values())


@dataclass(frozen=True)
class _Job:
    """One save, with its payloads by kind."""

    step: int
    payloads: Mapping[str, CheckpointPayload]
    on_finished: Callable[[], None]
    best: Mapping[str, Any] | None
    began: float
    # context in which the values are copied while training continues; None: training waits
    side_stream: AbstractContextManager[Any] | None = None


class _SaveError(Exception):
    """A disk error of any rank; raised on all ranks."""


class CheckpointWriter:
    """Saves steps of a run; every rank calls the methods."""

    def __init__(
        self, run_dir: Path, config: RunConfig, local_world_size: int = 1, timeout_seconds: float = 1800.0,
        has_moved: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """Remove the leftovers of a killed save.

        Args:
            local_world_size: ranks that share this host's memory.
            timeout_seconds: how long a rank waits for the other ranks' files.
            has_moved: whether ``run_dir`` is no longer this run's directory; rank 0 then writes nothing.
        """
        self._has_moved = has_moved
        self._run_dir, self._config, self._local_world_size = run_dir, config, local_world_size
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        # a separate group, so that the thread's messages never mix with training's
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # whether a background save has results to collect
        self._is_pending = False
        # set: no background save is running
        self._finished = threading.Event()
        self._finished.set()
        # set: the values of the current save may change
        self._copied = threading.Event()
        self._copied.set()
        self._error: BaseException | None = None
        # warnings of the current save, and of finished ones
        self._new_warnings: list[str] = []
        self._warnings: list[str] = []
        # seconds of the current save, of the last finished one, and of training stalled by saves
        self._seconds = self._last_seconds = self._stalled = 0.0
        # why the last attempted checkpoint was not written
        self.failure: str | None = None
        if self._rank == 0:
            remove_leftovers(run_dir)
        # started here, because starting a thread blocks forever once memory has run out
        self._thread = threading.Thread(target=self._run_jobs, name="checkpoint", daemon=True)
        self._thread.start()

    def save(
        self,
        step: int,
        payloads: Mapping[str, CheckpointPayload],
        on_finished: Callable[[], None] = lambda: None,
        best: Mapping[str, Any] | None = None,
    ) -> None:
        """Start writing a directory of ``step`` for each kind (``checkpoints``, ``snapshots``).

        Waits for the previous save first. The values must not change before ``wait_until_copied`` returns.

        Args:
            payloads: by kind; one of them has all shards of the others.
            on_finished: called on rank 0 after the directories are written or abandoned.
            best: record for ``write_best`` if the checkpoint is the best so far.
        """
        self.wait()
        with self._stall():
            job = _Job(step, payloads, on_finished, best, time.perf_counter())
            if self._config.save_in_background and self._has_room(payloads):
                self._copied.clear()
                self._finished.clear()
                self._is_pending = True
                self._jobs.put(replace(job, side_stream=_side_stream()))
            else:
                self._run(job)
                self._collect()

    def wait_until_copied(self) -> None:
        """Wait until the values of the current save may change."""
        if not self._copied.is_set():
            with self._stall():
                self._copied.wait()

    def wait(self) -> None:
        """Wait until the current save has finished.

        Raises:
            RuntimeError: if it failed for a reason other than the disk, such as the exit of another rank.
        """
        if self._is_pending:
            with self._stall():
                self._finished.wait()
            self._collect()

    def status_message(self) -> str:
        """Return the outcome of the last checkpoint."""
        if self.failure is None:
            return "checkpoint saved"
        return f"the checkpoint could not be written ({self.failure}); {self._latest_message(CHECKPOINTS)}"

    def scalars(self) -> dict[str, float]:
        """Return by tag the seconds of stalled training and of saves since the last call; zeros are left out."""
        if self._is_pending and self._finished.is_set():
            self._collect()
        seconds = {"speed/checkpoint_stall_seconds": self._stalled, "speed/checkpoint_seconds": self._last_seconds}
        self._stalled = self._last_seconds = 0.0
        return {tag: value for tag, value in seconds.items() if value}

    def warnings(self) -> list[str]:
        """Return the warnings of saves finished since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def close(self) -> None:
        """Wait for the current save without raising its error, which would hide an earlier one."""
        self._jobs.put(None)
        self._thread.join()

    @contextmanager
    def _stall(self) -> Iterator[None]:
        """Count the time of the ``with`` block as stalled training."""
        began = time.perf_counter()
        yield
        self._stalled += time.perf_counter() - began

    def _collect(self) -> None:
        """Take over the results of the finished save."""
        self._is_pending = False
        self._last_seconds, self._seconds = self._seconds, 0.0
        self._warnings += self._new_warnings
        self._new_warnings = []
        if self._error is not None:
            raise RuntimeError("the thread that writes checkpoints has failed") from self._error

    def _has_room(self, payloads: Mapping[str, CheckpointPayload]) -> bool:
        """Return whether this host has memory for a copy of its ranks' shards."""
        needed = self._local_world_size * max(payload.num_bytes for payload in payloads.values())
        memory = host_memory()
        return memory is not None and needed < COPY_SHARE * memory.free

    def _run_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(job)
            # the copies of the values must not outlive the save
            del job
            self._finished.set()

    def _run(self, job: _Job) -> None:
        """Write all directories of ``job``; with a side stream, copy the values first, since training continues."""
        try:
            payloads = job.payloads
            if job.side_stream is not None:
                with job.side_stream:
                    payloads = _copy(payloads)
                self._copied.set()
            # the checkpoint last: a run that resumes from it never reaches the snapshot of the same step again
            for kind in (SNAPSHOTS, CHECKPOINTS):
                if kind not in payloads:
                    continue
                payload, failure = payloads[kind], None
                try:
                    self._write(step_folder(self._run_dir, job.step, kind), job.step, payload, job.best)
                except _SaveError as reason:
                    failure = str(reason)
                    self._new_warnings.append(
                        f"the {kind.removesuffix('s')} of step {job.step} could not be written: {failure}; the next "
                        f"attempt is at the next interval; {self._latest_message(kind)}"
                    )
                if kind == CHECKPOINTS:
                    self.failure = failure
            if self._rank == 0:
                job.on_finished()
            self._seconds = time.perf_counter() - job.began
        except BaseException as error:
            self._error = error
        finally:
            self._copied.set()

    def _latest_message(self, kind: str) -> str:
        try:
            steps = saved_steps(self._run_dir, kind)
        except CheckpointError:
            steps = []
        return f"the latest one is from step {steps[-1]}" if steps else "there is none yet"

    def _write(self, folder: Path, step: int, payload: CheckpointPayload, best: Mapping[str, Any] | None) -> None:
        partial = partial_of(folder)
        sizes = self._exchange(payload.num_bytes)
        self._run_together(lambda: self._begin(partial, sum(sizes)) if self._rank == 0 else None)
        try:
            sums = self._run_together(lambda: self._write_files(partial, step, payload))
            files = {name: file_sum for of_rank in sums for name, file_sum in of_rank.items()}
            self._run_together(lambda: self._publish(partial, folder, files, best) if self._rank == 0 else None)
        except _SaveError:
            if self._rank == 0 and not self._has_moved():
                with suppress(OSError):
                    remove_tree(partial)
            raise

    def _begin(self, partial: Path, num_bytes: int) -> None:
        """Make the directory if the disk has room for its files."""
        # opened before the check: if the run directory is replaced after it, the folders are made in the moved one, and
        # the first file that is opened by its path fails
        run_dir = os.open(self._run_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._check_not_moved()
            remove_tree(partial)
            with suppress(FileExistsError):
                os.mkdir(partial.parent.name, dir_fd=run_dir)
            free = shutil.disk_usage(partial.parent).free
            if num_bytes > free:
                raise _SaveError(f"it needs {num_bytes / 1e6:.3g} MB, and the disk has {free / 1e6:.3g} MB left")
            os.mkdir(partial.relative_to(self._run_dir), dir_fd=run_dir)
        finally:
            os.close(run_dir)
        sync(self._run_dir)

    def _write_files(self, partial: Path, step: int, payload: CheckpointPayload) -> dict[str, FileChecksum]:
        name = rank_name(self._rank, self._world_size)
        sums = {name: write_fragments(partial / name, payload.shards)}
        if self._rank == 0:
            sums[SHARED_NAME] = write_file(partial / SHARED_NAME, save(dict(payload.shared)))
            document = {"version": VERSION, "step": step, "world_size": self._world_size, "shapes": payload.shapes}
            text = json.dumps(document | dict(payload.state), indent=1)
            sums[STATE_NAME] = write_file(partial / STATE_NAME, text.encode())
        return sums

    def _publish(
        self, partial: Path, folder: Path, files: Mapping[str, FileChecksum], best: Mapping[str, Any] | None
    ) -> None:
        """Rename the complete directory to its final name, and prune older checkpoints."""
        self._check_not_moved()
        CheckpointManifest(files).write(partial)
        sync(partial)
        for name in (METRICS_NAME, QUARANTINE_NAME):
            # the history should be on disk before its checkpoint; failure is only a warning, because the checkpoint is
            # worth more
            try:
                if (self._run_dir / name).exists():
                    sync(self._run_dir / name)
            except OSError as error:
                self._new_warnings.append(f"{name} may be incomplete after a crash: {_reason(error)}")
        publish(partial, folder)
        try:
            finish_removal(folder)
            write_whole(folder.parent / "latest", f"{folder.name}\n".encode())
            if folder.parent.name == CHECKPOINTS:
                if best is not None:
                    write_best(self._run_dir, best)
                prune(self._run_dir, self._config)
        except (OSError, CheckpointError) as error:
            # the checkpoint itself is complete
            self._new_warnings.append(f"{folder} is written, but not the files around it: {_reason(error)}")

    def _check_not_moved(self) -> None:
        if self._has_moved():
            raise _SaveError(f"{self._run_dir} was moved, replaced or deleted")

    def _run_together(self, work: Callable[[], _Result]) -> list[_Result]:
        """Run ``work`` on every rank and return all results; if one rank's disk fails, all ranks raise _SaveError."""
        try:
            result, fault = work(), None
        except (OSError, _SaveError) as error:
            result, fault = None, _reason(error)
        outcomes = self._exchange((result, fault))
        for _, reason in outcomes:
            if reason is not None:
                raise _SaveError(reason)
        return [result for result, _ in outcomes]

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def write_fragments(path: Path, shards: Mapping[str, Shard]) -> FileChecksum:
    """Write a safetensors file one shard at a time (its library needs all tensors at once); raises OSError."""
    header, offset = {}, 0
    for key, shard in shards.items():
        header[key] = {"dtype": "F32", "shape": [shard.numel], "data_offsets": [offset, offset + 4 * shard.numel]}
        offset += 4 * shard.numel
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with ChecksummedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shard in shards.items():
            tensor = shard.read().detach().to("cpu", torch.float32).contiguous()
            assert tensor.shape == (shard.numel,), key
            file.write(tensor.numpy().data)
        return file.finish()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


def _side_stream() -> AbstractContextManager[Any]:
    """Return a context for a thread: a CUDA stream that waits for the current stream; a null context without CUDA."""
    if not torch.cuda.is_initialized():
        return nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return _on(stream)


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    # the current device of a new thread is 0, where every rank would create a context
    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield


@torch.no_grad()
def _copy(payloads: Mapping[str, CheckpointPayload]) -> dict[str, CheckpointPayload]:
    """Copy all values into one new block of host memory, which the payloads share."""
    largest = max(payloads.values(), key=lambda payload: payload.num_bytes)
    memory, offset = torch.empty(largest.num_bytes // 4), 0
    copies: dict[str, Shard] = {}
    for key, shard in largest.shards.items():
        copy = memory.narrow(0, offset, shard.numel)
        copy.copy_(shard.read().detach())
        # a method bound to this tensor; a closure would see the last one of the loop
        copies[key] = Shard(shard.numel, copy.detach)
        offset += shard.numel
    return {
        kind: replace(
            payload,
            shards={key: copies[key] for key in payload.shards},
            shared={key: value.detach().to("cpu", copy=True).contiguous() for key, value in payload.shared.items()},
        )
        for kind, payload in payloads.items()
    }
