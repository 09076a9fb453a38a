"""Observers never end a run, and communicate in one order on all ranks."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from drawn_images import packed_set
from joined_processes import run_on_ranks
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import class_folder
from tiny_run import command

from streamtrain.training import observers
from streamtrain.training.observers import Observer, ObserverList

SCRIPT = Path(__file__).with_name("failing_observers.py")
EVERYTHING = (
    "run.steps=6", "monitor.tensorboard=true", "monitor.panel_every=2", "monitor.histogram_every=2",
    "monitor.collapse={every: 2, start: 1}", "evaluation.every=2", "evaluation.evaluators=[knn, linear, patches]",
    "evaluation.max_share=1.0", "evaluation.best=knn_20", "objective.gram.weight=1.0", "run.snapshot_every=2",
    "monitor.profile={start: 2, steps: 1}",
)  # fmt: skip


def test_failures_on_rank_0_disable_observers_and_the_run_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises on every rank if two ranks call different collectives."""
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    shards, labelled = packed_set(tmp_path, 40).path, class_folder(tmp_path / "labelled", ("a", "b"), each=20)
    words = command(shards, tmp_path / "run", *EVERYTHING, f"evaluation.train={labelled}")
    first, second = run_ranks([SCRIPT, *words[1:]], 2)
    assert [first[0], second[0]] == [0, 0], first[2][-3000:] + second[2][-3000:]
    names = ("CropPictures", "drawing of feature maps", "Histograms", "the projector", "Evaluation")
    for name in names:
        assert first[2].count(f"warning: {name} failed and is disabled for the rest of this run\nTraceback") == 1
    assert first[2].count("is disabled") == len(names)
    assert first[2].count("warning: the linear probe failed\nTraceback") == 1
    # an observer that communicates is disabled on all ranks
    assert second[2].count("is disabled") == 1 and "warning: Evaluation failed" in second[2]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 7))
    assert all("speed/all_gather_seconds" in record for record in records[1::2])
    assert [record["step"] for record in records if "eval/linear" in record] == [2]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == [] and len(events.Scalars("loss/total")) == 6


class Summing(Observer):
    """Communicates at every step; raises on ``failing`` ranks, before or after the collective."""

    def __init__(self, failing: tuple[int, ...], *, before: bool = False) -> None:
        self.failing, self.before, self.calls = failing, before, 0

    def communicates(self, result: Any) -> bool:
        return True

    def after_step(self, result: Any) -> dict[str, float]:
        self.calls += 1
        for is_before in (True, False):
            if dist.get_rank() in self.failing and is_before == self.before:
                raise RuntimeError("failing")
            if is_before:
                dist.all_reduce(total := torch.ones(()))
        return {f"sum/{self.failing}": float(total)}


class Local(Observer):
    """Fails on one rank without communicating."""

    def __init__(self, failing: int) -> None:
        self.failing, self.calls = failing, 0

    def after_step(self, result: Any) -> dict[str, float]:
        self.calls += 1
        if dist.get_rank() == self.failing:
            raise RuntimeError("failing")
        return {"local": 1.0}


def observe_on_a_rank(rank: int) -> None:
    logging.disable()
    result: Any = SimpleNamespace(step=1)
    parts = [Summing((0,)), Local(1), Summing((0, 1)), Summing(())]
    together = ObserverList(parts)
    expected = {"sum/()": 2.0} | ({"local": 1.0} if rank == 0 else {})
    for _ in range(3):
        # the metrics of the first observer are dropped on rank 1 as well
        assert together.after_step(result) == expected
    assert [part.calls for part in parts] == [1, 3 if rank == 0 else 1, 1, 3]


def test_ranks_agree_which_observers_are_disabled(tmp_path: Path) -> None:
    run_on_ranks(observe_on_a_rank, tmp_path)


def fail_between_collectives(rank: int) -> None:
    observers.AGREEMENT_SECONDS = 2.0
    ObserverList([Summing((0,), before=True)]).after_step(SimpleNamespace(step=1))  # type: ignore[arg-type]


def test_a_rank_that_fails_before_a_collective_ends_the_run_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match=r"terminated"):
        run_on_ranks(fail_between_collectives, tmp_path)
    assert time.monotonic() - start < 30
