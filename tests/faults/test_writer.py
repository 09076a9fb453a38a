"""Kill the checkpoint writer at each of its file-system calls: the old or the new checkpoint stays intact."""

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
# the hardest case: the old checkpoint is deleted as soon as the new one exists
RUN = RunConfig(keep_last=1)


@dataclass(frozen=True)
class ConstantShard:
    """A source of ``numel`` equal values."""

    numel: int
    value: float

    def read(self) -> torch.Tensor:
        return torch.full((self.numel,), self.value)


def make_payloads(step: int, world_size: int) -> dict[str, CheckpointPayload]:
    def shards(kinds: tuple[str, ...]) -> dict[str, ConstantShard]:
        numels = {name: -(-torch.Size(shape).numel() // world_size) for name, shape in SHAPES.items()}
        return {f"{kind}/{name}": ConstantShard(numel, float(step)) for kind in kinds for name, numel in numels.items()}

    state = {"data": {"slot": step, "lane_block": 1}}
    return {
        CHECKPOINTS: CheckpointPayload(shards(("master", "ema")), {"center": torch.zeros(3)}, SHAPES, state),
        SNAPSHOTS: CheckpointPayload(shards(("ema",)), {}, SHAPES, {}),
    }


def save_steps(rank: int, run: Path, steps: tuple[int, ...], world_size: int, dying: int, fatal: int | None) -> None:
    """Save some steps; in the last one, rank ``dying`` is killed at call ``fatal`` or, if None, reports its calls."""
    writer = CheckpointWriter(run, RUN)
    for step in steps[:-1]:
        writer.save(step, make_payloads(step, world_size))
        writer.wait()
    disk = FailingDisk("checkpoint", run.parent / "report.json", fatal) if rank == dying else None
    writer.save(steps[-1], make_payloads(steps[-1], world_size))
    writer.wait()
    assert writer.failure is None
    if disk is not None:
        disk.write_report()


def save_on_ranks(
    folder: Path, steps: tuple[int, ...], world_size: int, dying: int = 0, fatal: int | None = None
) -> list[str]:
    """Run ``save_steps`` for ``folder/run`` on all ranks; return the file-system calls of rank ``dying``."""
    rendezvous = Path(tempfile.mkdtemp(dir=folder))
    run_on_ranks(save_steps, rendezvous, folder / "run", steps, world_size, dying, fatal, ranks=world_size)
    return read_calls(folder)


def read_calls(folder: Path) -> list[str]:
    return list(json.loads((folder / "report.json").read_text())["calls"])


def copy_run(folder: Path, name: str) -> Path:
    copy = folder / name
    shutil.copytree(folder / "before", copy)
    return copy


def find_newest_intact(run: Path) -> int:
    return next(s for s in reversed(saved_steps(run)) if find_fault(step_folder(run, s), contents=True) is None)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_call_leaves_the_old_or_the_new_checkpoint(world_size: int, tmp_path: Path) -> None:
    run = tmp_path / "before" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    save_on_ranks(tmp_path / "before", (1, 2), world_size)
    newest = Counter[int]()
    for dying in range(world_size):
        calls = save_on_ranks(copy_run(tmp_path, f"whole-{dying}"), (3,), world_size, dying)
        assert {"open", "write", "fsync"} <= set(calls)
        for fatal in range(len(calls)):
            folder = copy_run(tmp_path, f"{dying}-{fatal}")
            with pytest.raises((ProcessExitedException, ProcessRaisedException)):
                save_on_ranks(folder, (3,), world_size, dying, fatal)
            assert read_calls(folder) == calls[:fatal]
            newest[check_after_kill(folder, world_size)] += 1
            shutil.rmtree(folder)
        if dying == 0:
            assert {"rename", "replace", "mkdir", "unlink", "rmdir"} <= set(calls)
    assert set(newest) == {2, 3}
    print(f"{newest.total()} deaths on {world_size} rank(s): {newest[2]} left the old checkpoint, {newest[3]} the new")


def check_after_kill(folder: Path, world_size: int) -> int:
    """Check the run directory after a kill, then after a power cut; return the newest step after the kill."""
    run = folder / "run"
    # every folder named like a checkpoint is an intact checkpoint
    steps = saved_steps(run)
    assert all(find_fault(step_folder(run, step), contents=True) is None for step in steps), steps
    assert steps in ([2], [2, 3], [3])
    cut_power(folder / "report.json")
    newest = find_newest_intact(run)
    assert newest in (2, 3)
    weights = read_weights(run, newest)
    assert all(bool((weights[name] == newest).all()) for name in SHAPES)
    # the next start continues and removes partial files
    save_on_ranks(folder, (newest + 1,), world_size)
    assert saved_steps(run) == [newest + 1] and saved_steps(run, SNAPSHOTS)[-1] == newest + 1
    assert not list(run.rglob(".*"))
    return steps[-1]
