"""What is saved is what stood there, while the training goes on and changes it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from joined_processes import run_on_ranks

from streamtrain.checkpoint.reader import read_weights
from streamtrain.checkpoint.writer import Contents, Saver
from streamtrain.config.run import RunConfig
from streamtrain.run.directory import CHECKPOINTS

NUMEL = 1000
SECONDS = 0.2


@dataclass(frozen=True)
class Slow:
    """Values whose reading tells that it has ``begun``, and ends when it ``may_end``."""

    values: torch.Tensor
    begun: threading.Event
    may_end: threading.Event

    @property
    def numel(self) -> int:
        return len(self.values)

    def read(self) -> torch.Tensor:
        self.begun.set()
        assert self.may_end.wait(60)
        return self.values


def train_on(rank: int, run: Path) -> None:
    saver = Saver(run, RunConfig())
    values, begun, may_end = torch.full((NUMEL,), 1.0), threading.Event(), threading.Event()
    whole = Contents({"ema/a": Slow(values, begun, may_end)}, {}, {"a": (NUMEL,)}, {"data": {}})
    saver.save(1, {CHECKPOINTS: whole})
    # the next step is under way meanwhile, up to its update
    assert begun.wait(60)
    threading.Timer(SECONDS, may_end.set).start()
    saver.copied()
    assert may_end.is_set()
    values.fill_(2.0)
    saver.copied()
    saver.wait()
    # the rest of the copy, which training waited for
    assert saver.scalars()["speed/checkpoint_stall_seconds"] > 0.9 * SECONDS
    assert saver.failure is None and bool((read_weights(run)["a"] == 1.0).all())


def fail(rank: int, run: Path) -> None:
    class Broken(Slow):
        def read(self) -> torch.Tensor:
            raise RuntimeError("the device is gone")

    saver = Saver(run, RunConfig())
    broken = Broken(torch.zeros(NUMEL), threading.Event(), threading.Event())
    saver.save(1, {CHECKPOINTS: Contents({"ema/a": broken}, {}, {"a": (NUMEL,)}, {"data": {}})})
    saver.copied()
    with pytest.raises(RuntimeError, match="the thread that writes checkpoints has failed"):
        saver.wait()


def test_values_may_change_once_they_are_copied(tmp_path: Path) -> None:
    run_on_ranks(train_on, tmp_path, tmp_path, ranks=1)


def test_training_does_not_wait_for_a_copy_that_has_failed(tmp_path: Path) -> None:
    run_on_ranks(fail, tmp_path, tmp_path, ranks=1)
