"""A checkpoint contains the values at the time of the save, while training continues and changes them."""

from __future__ import annotations

import shutil
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from joined_processes import run_on_ranks

from streamtrain.checkpoint import writer as writer_module
from streamtrain.checkpoint.reader import read_weights
from streamtrain.checkpoint.writer import CheckpointPayload, CheckpointWriter
from streamtrain.config.run import RunConfig
from streamtrain.run.directory import CHECKPOINTS, SNAPSHOTS, saved_steps

NUMEL = 1000
SECONDS = 0.2


@dataclass(frozen=True)
class SlowShard:
    """A shard whose reading sets ``started`` and waits for ``may_finish``."""

    values: torch.Tensor
    started: threading.Event
    may_finish: threading.Event

    @property
    def numel(self) -> int:
        return len(self.values)

    def read(self) -> torch.Tensor:
        self.started.set()
        assert self.may_finish.wait(60)
        return self.values


class BrokenShard(SlowShard):
    def read(self) -> torch.Tensor:
        raise RuntimeError("the device is gone")


def payload_of(shard: SlowShard) -> dict[str, CheckpointPayload]:
    return {CHECKPOINTS: CheckpointPayload({"ema/a": shard}, {}, {"a": (NUMEL,)}, {"data": {}})}


def train_while_copying(rank: int, run: Path) -> None:
    writer = CheckpointWriter(run, RunConfig())
    values, started, may_finish = torch.full((NUMEL,), 1.0), threading.Event(), threading.Event()
    writer.save(1, payload_of(SlowShard(values, started, may_finish)))
    # meanwhile the next step runs up to its update
    assert started.wait(60)
    threading.Timer(SECONDS, may_finish.set).start()
    writer.wait_until_copied()
    assert may_finish.is_set()
    values.fill_(2.0)
    writer.wait_until_copied()
    writer.wait()
    # the rest of the copy, which training waited for
    assert writer.scalars()["speed/checkpoint_stall_seconds"] > 0.9 * SECONDS
    assert writer.failure is None and bool((read_weights(run)["a"] == 1.0).all())
    assert writer.status_message() == "checkpoint saved"


def fail_while_copying(rank: int, run: Path) -> None:
    writer = CheckpointWriter(run, RunConfig())
    writer.save(1, payload_of(BrokenShard(torch.zeros(NUMEL), threading.Event(), threading.Event())))
    writer.wait_until_copied()
    with pytest.raises(RuntimeError, match="the thread that writes checkpoints has failed"):
        writer.wait()


def save_two_lives(rank: int, run: Path) -> None:
    shapes = {"a": (NUMEL,)}
    for life in (1.0, 2.0):
        writer = CheckpointWriter(run, RunConfig())
        done = threading.Event()
        done.set()
        shard = SlowShard(torch.full((NUMEL,), life), threading.Event(), done)
        writer.save(3, {SNAPSHOTS: CheckpointPayload({"ema/a": shard}, {}, shapes, {})})
        writer.wait()
        assert writer.warnings() == []
        assert bool((read_weights(run)["a"] == life).all())
        writer.close()
    assert [path.name for path in (run / SNAPSHOTS).glob("*step*")] == ["step-000000003"]


def save_without_new_threads(rank: int, run: Path) -> None:
    writer = CheckpointWriter(run, RunConfig())

    def fail(thread: threading.Thread) -> None:
        raise MemoryError

    threading.Thread.start = fail  # type: ignore[method-assign]
    done = threading.Event()
    done.set()
    for step in (1, 2):
        writer.save(step, payload_of(SlowShard(torch.full((NUMEL,), 1.0), threading.Event(), done)))
        writer.wait()
    assert saved_steps(run) == [1, 2] and writer.failure is None


def replace_while_saving(rank: int, run: Path) -> None:
    """The run directory is replaced by a copy of itself right after one of the checks."""
    shutil.copytree(run, run / "copy")
    done = threading.Event()
    done.set()
    for check in (1, 2):
        checks = 0

        def replace_it(check: int = check) -> bool:
            nonlocal checks
            checks += 1
            if checks == check:
                run.rename(run.with_name(f"moved_{check}"))
                shutil.copytree(run.with_name(f"moved_{check}") / "copy", run)
                shutil.copytree(run, run / "copy")
            return checks > check

        writer = CheckpointWriter(run, RunConfig(), has_moved=replace_it)
        writer.save(1, payload_of(SlowShard(torch.full((NUMEL,), 1.0), threading.Event(), done)))
        writer.wait()
        assert writer.failure is not None and checks >= check
        assert not list(run.rglob("*step*")), check
        writer.close()


@pytest.mark.parametrize("folders", [(), (CHECKPOINTS,)])
def test_nothing_is_written_to_a_directory_that_replaced_the_run(folders: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for folder in folders:
        (run / folder).mkdir()
    run_on_ranks(replace_while_saving, tmp_path, run, ranks=1)


def test_a_snapshot_newer_than_the_checkpoint_is_replaced(tmp_path: Path) -> None:
    run_on_ranks(save_two_lives, tmp_path, tmp_path, ranks=1)


def test_saves_start_no_thread(tmp_path: Path) -> None:
    """A thread that starts when memory has run out blocks its caller forever."""
    run_on_ranks(save_without_new_threads, tmp_path, tmp_path, ranks=1)


def test_the_thread_uses_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread is on GPU 0, where leaving its stream would make a context of this process."""
    calls: list[object] = []
    stream = SimpleNamespace(device=torch.device("cuda", 3), wait_stream=calls.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "training")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "stream", lambda entered: calls.append(entered) or nullcontext())
    with writer_module._side_stream():
        pass
    assert calls == ["training", stream.device, stream]


def test_values_may_change_after_they_are_copied(tmp_path: Path) -> None:
    run_on_ranks(train_while_copying, tmp_path, tmp_path, ranks=1)


def test_training_does_not_wait_for_a_failed_copy(tmp_path: Path) -> None:
    run_on_ranks(fail_while_copying, tmp_path, tmp_path, ranks=1)
