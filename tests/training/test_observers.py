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

from streamtrain.config.load import build
from streamtrain.ops.collectives import SharedFailure
from streamtrain.reporting.sink import BestEffort
from streamtrain.training.observers import Observer, ObserverList, StartFiles

SCRIPT = Path(__file__).with_name("failing_observers.py")
EVERYTHING = (
    "run.steps=8", "monitor.tensorboard=true", "monitor.panel_every=2", "monitor.histogram_every=2",
    "monitor.collapse={every: 2, start: 1}", "evaluation.every=2", "evaluation.evaluators=[knn, linear, patches]",
    "evaluation.max_share=1.0", "evaluation.best=knn_20", "objective.gram.weight=1.0", "run.snapshot_every=2",
    "monitor.profile={start: 2, steps: 1}",
)  # fmt: skip


def test_failures_on_rank_0_leave_out_single_metrics_and_the_run_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises on every rank if two ranks call different collectives."""
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    shards, labelled = packed_set(tmp_path, 40).path, class_folder(tmp_path / "labelled", ("a", "b"), each=20)
    words = command(shards, tmp_path / "run", *EVERYTHING, f"evaluation.train={labelled}")
    first, second = run_ranks([SCRIPT, *words[1:]], 2)
    assert [first[0], second[0]] == [0, 0], first[2][-3000:] + second[2][-3000:]
    log = tmp_path / "run" / "tracebacks.log"
    names = ("CropPictures", "drawing of feature maps", "Histograms", "the projector", "Trace", "Evaluation")
    for name in names:
        message = f"warning: {name} failed and is left out; training continues"
        assert first[2].count(f"{message}: RuntimeError: out of ink (traceback in {log})\n") == 1
        assert log.read_text().count(f"{message}\nTraceback") == 1
    assert "Traceback" not in first[2] + second[2] and "failed" not in second[2]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert all("speed/all_gather_seconds" in record for record in records[1::2])
    assert [record["step"] for record in records if "eval/linear" in record] == [2, 8]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == [] and len(events.Scalars("loss/total")) == 8


class Summing(Observer):
    """Communicates at every step; at odd calls it fails on ``failing`` ranks, before or after the collective."""

    def __init__(self, failure: SharedFailure, failing: tuple[int, ...], *, before: bool = False) -> None:
        self.failure, self.failing, self.before, self.calls = failure, failing, before, 0

    def communicates(self, result: Any) -> bool:
        return True

    def after_step(self, result: Any) -> dict[str, float]:
        self.calls += 1
        self.failure.run(self.work, True)
        dist.all_reduce(total := torch.ones(()))
        self.work(False)
        return {f"sum/{self.failing}{self.before}": float(total)}

    def work(self, is_before: bool) -> None:
        if dist.get_rank() in self.failing and is_before == self.before and self.calls % 2:
            raise RuntimeError("failing")


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
    failure = SharedFailure(20.0)
    parts = [Summing(failure, (0,)), Summing(failure, (1,), before=True), Local(1), Summing(failure, (0, 1))]
    together = ObserverList([*parts, Summing(failure, ())], failure)
    together.start()
    local = {"local": 1.0} if rank == 0 else {}
    for call in range(1, 5):
        # metrics that one rank lacks are dropped on the other as well
        all_sums = {"sum/(0,)False", "sum/(1,)True", "sum/(0, 1)False", "sum/()False"}
        expected = dict.fromkeys(all_sums if call % 2 == 0 else {"sum/()False"}, 2.0)
        assert together.after_step(result) == expected | local
    assert [part.calls for part in parts] == [4] * 4


def test_ranks_agree_which_metrics_are_left_out(tmp_path: Path) -> None:
    run_on_ranks(observe_on_a_rank, tmp_path)


def fail_to_start_on_a_rank(rank: int) -> None:
    logging.disable()
    failure = SharedFailure(20.0)
    failing = Summing(failure, ())
    failing.start = lambda: failure.run(lambda: 1 / rank)  # type: ignore[method-assign]
    together = ObserverList([failing, Local(-1)], failure)
    together.start()
    assert together.after_step(SimpleNamespace(step=1)) == {"local": 1.0}  # type: ignore[arg-type]


def test_an_observer_that_cannot_start_on_a_rank_is_left_out_on_all(tmp_path: Path) -> None:
    run_on_ranks(fail_to_start_on_a_rank, tmp_path)


class Careless(Observer):
    """Fails on rank 0 before a collective, without telling the other rank."""

    def communicates(self, result: Any) -> bool:
        return True

    def after_step(self, result: Any) -> dict[str, float]:
        assert dist.get_rank()
        dist.all_reduce(torch.ones(()))
        return {}


def fail_between_collectives(rank: int) -> None:
    ObserverList([Careless()], SharedFailure(2.0)).after_step(SimpleNamespace(step=1))  # type: ignore[arg-type]


def test_a_rank_that_fails_within_collectives_ends_the_run_at_the_time_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(Exception, match=r"terminated"):
        run_on_ranks(fail_between_collectives, tmp_path)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_interruptions_are_no_failures(interruption: type[BaseException]) -> None:
    def interrupt() -> None:
        raise interruption

    with pytest.raises(interruption):
        BestEffort("work").run(interrupt)


def test_files_that_describe_the_run_are_written_when_the_disk_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streamtrain.training.observers.RETRY_SECONDS", 0.0)
    run_dir = tmp_path / "run"
    runtime: Any = SimpleNamespace(rank=0, world_size=1, description={})
    planned: Any = SimpleNamespace(step_bytes=10**9)
    files = StartFiles(build({"run": {"dir": str(run_dir)}}), runtime, 40, planned)
    result: Any = None
    files.start()
    assert "cannot be written" in caplog.text
    run_dir.mkdir()
    files.after_step(result)
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "environment.json"}
    assert json.loads((run_dir / "environment.json").read_text())["planned_peak_bytes"] == 10**9
