"""A checkpoint's writer stopped at every call that changes the disk: the previous or the new one is there, whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from faults.failing_disk import FailingDisk, cut_power
from joined_processes import run_on_ranks
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from streamtrain.checkpoint.reader import read_weights
from streamtrain.checkpoint.writer import CheckpointPayload, CheckpointWriter
from streamtrain.config.run import RunConfig
from streamtrain.run.directory import CHECKPOINTS, SNAPSHOTS, saved_steps, step_folder
from streamtrain.run.step_manifest import find_fault

SHAPES = {"backbone.a": (30, 7), "head.b": (5,)}
# the hardest case: the old one goes as soon as the new one is there
RUN = RunConfig(keep_last=1)


@dataclass(frozen=True)
class Values:
    numel: int
    value: float

    def read(self) -> torch.Tensor:
        return torch.full((self.numel,), self.value)


def contents(step: int, world_size: int) -> dict[str, CheckpointPayload]:
    def shards(kinds: tuple[str, ...]) -> dict[str, Values]:
        numels = {name: -(-torch.Size(shape).numel() // world_size) for name, shape in SHAPES.items()}
        return {f"{kind}/{name}": Values(numel, float(step)) for kind in kinds for name, numel in numels.items()}

    state = {"data": {"slot": step, "lane_block": 1}}
    return {
        CHECKPOINTS: CheckpointPayload(shards(("master", "ema")), {"center": torch.zeros(3)}, SHAPES, state),
        SNAPSHOTS: CheckpointPayload(shards(("ema",)), {}, SHAPES, {}),
    }


def save(rank: int, run: Path, steps: tuple[int, ...], world_size: int, dying: int, fatal: int | None) -> None:
    """Save some steps; during the last one, rank ``dying`` dies at its call ``fatal``, or tells of all its calls."""
    saver = CheckpointWriter(run, RUN)
    for step in steps[:-1]:
        saver.save(step, contents(step, world_size))
        saver.wait()
    disk = FailingDisk("checkpoint", run.parent / "report.json", fatal) if rank == dying else None
    saver.save(steps[-1], contents(steps[-1], world_size))
    saver.wait()
    assert saver.failure is None
    if disk is not None:
        disk.tell()


def saved(folder: Path, steps: tuple[int, ...], world_size: int, dying: int = 0, fatal: int | None = None) -> list[str]:
    """Run ``save`` for ``folder/run`` on some ranks; returns the calls of the dying one."""
    meeting = Path(tempfile.mkdtemp(dir=folder))
    run_on_ranks(save, meeting, folder / "run", steps, world_size, dying, fatal, ranks=world_size)
    return calls_of(folder)


def calls_of(folder: Path) -> list[str]:
    return list(json.loads((folder / "report.json").read_text())["calls"])


def copied(folder: Path, name: str) -> Path:
    place = folder / name
    shutil.copytree(folder / "before", place)
    return place


def find_newest_intact(run: Path) -> int:
    return next(s for s in reversed(saved_steps(run)) if find_fault(step_folder(run, s), contents=True) is None)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_writer_stopped_at_any_call_leaves_the_old_or_the_new_whole(world_size: int, tmp_path: Path) -> None:
    run = tmp_path / "before" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    saved(tmp_path / "before", (1, 2), world_size)
    newest = Counter[int]()
    for dying in range(world_size):
        calls = saved(copied(tmp_path, f"whole-{dying}"), (3,), world_size, dying)
        assert {"open", "write", "fsync"} <= set(calls)
        for fatal in range(len(calls)):
            place = copied(tmp_path, f"{dying}-{fatal}")
            with pytest.raises((ProcessExitedException, ProcessRaisedException)):
                saved(place, (3,), world_size, dying, fatal)
            assert calls_of(place) == calls[:fatal]
            newest[after_a_death(place, world_size)] += 1
            shutil.rmtree(place)
        if dying == 0:
            assert {"rename", "replace", "mkdir", "unlink", "rmdir"} <= set(calls)
    assert set(newest) == {2, 3}
    print(f"{newest.total()} deaths on {world_size} rank(s): {newest[2]} left the old checkpoint, {newest[3]} the new")


def after_a_death(place: Path, world_size: int) -> int:
    """The step that the next start goes on from, after a kill alone; checks that, and what a power cut would leave."""
    run = place / "run"
    # whatever bears the name of a checkpoint is one
    steps = saved_steps(run)
    assert all(find_fault(step_folder(run, step), contents=True) is None for step in steps), steps
    assert steps in ([2], [2, 3], [3])
    cut_power(place / "report.json")
    newest = find_newest_intact(run)
    assert newest in (2, 3)
    weights = read_weights(run, newest)
    assert all(bool((weights[name] == newest).all()) for name in SHAPES)
    # and the next start goes on, and clears away what was left
    saved(place, (newest + 1,), world_size)
    assert saved_steps(run) == [newest + 1] and saved_steps(run, SNAPSHOTS)[-1] == newest + 1
    assert not list(run.rglob(".*"))
    return steps[-1]
