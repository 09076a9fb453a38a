"""Runs of two ranks that are killed, stopped and damaged end bit-identical to an uninterrupted run."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drawn_images import draw_folder
from faults.test_damage import flip_a_bit
from ranks import RankProcess, run_ranks, start_ranks
from tiny_run import command, logged

from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.run.directory import SNAPSHOTS, saved_steps, step_folder
from streamtrain.run.step_manifest import find_fault

TIMEOUT_SECONDS = 300
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


class TinyRuns:
    """Interrupted runs of two ranks, and the uninterrupted run to compare with."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        for name, images in (("first", 40), ("second", 13)):
            pack(draw_folder(folder / f"{name}-images", images), folder / name, PackOptions(shard_bytes=8_000))
        results = run_ranks(self.command("straight", "run.checkpoint_every=0"), 2, TIMEOUT_SECONDS)
        assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]

    def command(self, name: str, *overrides: str) -> list[str]:
        shared = (f"run.steps={self.steps}", "run.keep_last=2", "monitor.panel_every=0", *overrides)
        mixture = f"[{{shards: {self.folder / 'first'}, weight: 3}}, {{shards: {self.folder / 'second'}, weight: 1}}]"
        return command(mixture, self.folder / name, *shared)

    def start(self, name: str, *overrides: str) -> list[RankProcess]:
        return start_ranks(self.command(name, *overrides), 2)

    def steps_of(self, name: str) -> int:
        """Return the number of lines in ``metrics.jsonl``."""
        log = self.folder / name / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def mtime_of(self, name: str) -> int:
        """Return the modification time of ``metrics.jsonl`` in ns, or 0 without one."""
        log = self.folder / name / "metrics.jsonl"
        return log.stat().st_mtime_ns if log.exists() else 0

    def assert_same_as_straight(self, name: str) -> None:
        """Assert that each step was logged once, in order, with equal losses, and that the final states are equal."""
        records, expected = logged(self.folder / name), logged(self.folder / "straight")
        assert self.steps_of(name) == self.steps and list(records) == list(range(1, self.steps + 1))
        assert [record["slot"] for record in records.values()] == [8 * step for step in records]
        assert records == expected
        states = []
        for run in (name, "straight"):
            with checkpoint.open_checkpoint(step_folder(self.folder / run, self.steps)) as reader:
                keys = [f"{kind}/{parameter}" for kind in KINDS for parameter in reader.state["shapes"]]
                state = {key: reader.read_full(key) for key in keys}
                states.append(state | reader.read_shared() | {"slot": torch.tensor(reader.state["data"]["next_slot"])})
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def wait_until(processes: list[RankProcess], happened: Callable[[], bool]) -> bool:
    """Wait for ``happened``; return False if a rank ends first."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not happened():
        if any(process.poll() is not None for process in processes):
            return False
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


def wait_for_exit(processes: list[RankProcess]) -> list[tuple[int, str, str]]:
    outputs = [process.communicate(timeout=TIMEOUT_SECONDS) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def kill(processes: list[RankProcess]) -> None:
    for process in processes:
        process.kill()
    wait_for_exit(processes)


def test_a_run_that_is_killed_saved_stopped_and_damaged(tmp_path: Path) -> None:
    runs = TinyRuns(tmp_path, 20)
    run = tmp_path / "broken"
    processes = runs.start("broken", "run.checkpoint_every=2", "run.snapshot_every=3")
    assert wait_until(processes, lambda: runs.steps_of("broken") >= 3)
    kill(processes)
    # a torn last line, as after a kill during a write
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 99, "lo')

    # without scheduled checkpoints, SAVE requests one; the file is removed when it exists
    (run / "SAVE").touch()
    processes = runs.start("broken", "run.checkpoint_every=0")
    assert wait_until(processes, lambda: not (run / "SAVE").exists())
    requested = saved_steps(run)[-1]
    assert find_fault(step_folder(run, requested), contents=True) is None
    processes[1].send_signal(signal.SIGTERM)
    results = wait_for_exit(processes)
    assert [code for code, _, _ in results] == [75, 75], results[0][2][-3000:]
    stopped = saved_steps(run)[-1]
    assert f"stopped at step {stopped}, checkpoint saved" in results[0][1] and requested < stopped

    flip_a_bit(step_folder(run, stopped) / "rank-00001-of-00002.safetensors", 0.5)
    (run / "checkpoints" / "latest").unlink()
    results = wait_for_exit(runs.start("broken", "run.checkpoint_every=5", "run.snapshot_every=3"))
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert f"checkpoint step-{stopped:09d} is damaged" in results[0][2]
    assert f"resuming at step {requested} from" in results[0][1]
    runs.assert_same_as_straight("broken")
    assert saved_steps(run)[-1] == 20 and (run / "checkpoints" / "latest").read_text() == "step-000000020\n"
    assert saved_steps(run, SNAPSHOTS)[-1] == 18


@pytest.mark.slow
def test_twenty_runs_killed_at_random_moments(tmp_path: Path) -> None:
    runs = TinyRuns(tmp_path, 40)
    kills = starts = 0
    for number in range(20):
        draw, name = random.Random(number), f"run-{number}"
        every = draw.choice((1, 2, 3, 5))
        complete = False
        while not complete:
            starts += 1
            processes = runs.start(name, f"run.checkpoint_every={every}", "run.snapshot_every=4")
            if wait_for_kill(runs, name, draw, processes):
                kills += 1
                # kill one rank first, so that the other may notice
                processes[draw.randrange(2)].kill()
                time.sleep(draw.choice((0.0, 0.05, 0.5)))
                kill(processes)
            else:
                results = wait_for_exit(processes)
                assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
                complete = True
        runs.assert_same_as_straight(name)
        shutil.rmtree(runs.folder / name)
        print(f"run {number}: checkpoints every {every} step(s), {kills} kills in {starts} starts so far", flush=True)


@pytest.mark.slow
def test_ten_runs_stopped_by_a_signal_to_one_rank(tmp_path: Path) -> None:
    runs = TinyRuns(tmp_path, 40)
    stops = 0
    for number in range(10):
        draw, name = random.Random(number), f"run-{number}"
        while True:
            processes = runs.start(name, f"run.checkpoint_every={draw.choice((0, 3))}")
            # only once the run has started: before that, the signal just ends the process
            if wait_for_steps(runs, name, draw.randint(1, 20), processes):
                time.sleep(draw.uniform(0.0, 0.3))
                processes[draw.randrange(2)].send_signal(draw.choice((signal.SIGTERM, signal.SIGUSR1)))
            results = wait_for_exit(processes)
            codes = [code for code, _, _ in results]
            assert codes in ([75, 75], [0, 0]), results[0][2][-3000:]
            if codes == [0, 0]:
                break
            stops += 1
            assert f"stopped at step {saved_steps(runs.folder / name)[-1]}, checkpoint saved" in results[0][1]
        runs.assert_same_as_straight(name)
        shutil.rmtree(runs.folder / name)
        print(f"run {number}: {stops} stops so far", flush=True)


def wait_for_kill(runs: TinyRuns, name: str, draw: random.Random, processes: list[RankProcess]) -> bool:
    """Wait until the time to kill, before the first step or after a later one; return False if the run ends first."""
    if draw.random() < 0.15:
        time.sleep(draw.uniform(0.5, 6.0))
        return all(process.poll() is None for process in processes)
    if not wait_for_steps(runs, name, draw.randint(1, 20), processes):
        return False
    time.sleep(draw.uniform(0.0, 0.3))
    return True


def wait_for_steps(runs: TinyRuns, name: str, steps: int, processes: list[RankProcess]) -> bool:
    """Wait until the run is ``steps`` steps past its checkpoint; return False if a rank ends first."""
    initial = runs.mtime_of(name)
    last = max(saved_steps(runs.folder / name), default=0) + steps
    return wait_until(processes, lambda: runs.mtime_of(name) != initial and runs.steps_of(name) >= last)
