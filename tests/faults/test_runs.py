"""Runs of two ranks that are killed, stopped and damaged: in the end they are the one that was not, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drawn_images import draw_folder
from faults.test_damage import flip_a_bit
from ranks import run_ranks, start_ranks
from tiny_run import command, logged

from shards.packing.pack import PackOptions, pack
from streamtrain.checkpoint import reader as checkpoint
from streamtrain.run.directory import SNAPSHOTS, saved_steps, step_folder
from streamtrain.run.step_manifest import find_fault

PATIENCE_SECONDS = 300
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


class Toy:
    """A run of two ranks, and the unbroken one that it is compared with."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        for name, images in (("first", 40), ("second", 13)):
            pack(draw_folder(folder / f"{name}-images", images), folder / name, PackOptions(shard_bytes=8_000))
        results = run_ranks(self.words("straight", "run.checkpoint_every=0"), 2, PATIENCE_SECONDS)
        assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]

    def words(self, name: str, *overrides: str) -> list[str]:
        given = (f"run.steps={self.steps}", "run.keep_last=2", "monitor.panel_every=0", *overrides)
        mixture = f"[{{shards: {self.folder / 'first'}, weight: 3}}, {{shards: {self.folder / 'second'}, weight: 1}}]"
        return command(mixture, self.folder / name, *given)

    def start(self, name: str, *overrides: str) -> list[subprocess.Popen[str]]:
        return start_ranks(self.words(name, *overrides), 2)

    def steps_of(self, name: str) -> int:
        """Lines of the run's history."""
        log = self.folder / name / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def written_at(self, name: str) -> int:
        """When its history was last written, in ns; 0 if there is none yet."""
        log = self.folder / name / "metrics.jsonl"
        return log.stat().st_mtime_ns if log.exists() else 0

    def same(self, name: str) -> None:
        """Every step once and in order, with the same slots and losses; the same state at the end."""
        ours, theirs = logged(self.folder / name), logged(self.folder / "straight")
        assert self.steps_of(name) == self.steps and list(ours) == list(range(1, self.steps + 1))
        assert [record["slot"] for record in ours.values()] == [8 * step for step in ours]
        assert ours == theirs
        states = []
        for run in (name, "straight"):
            with checkpoint.open_checkpoint(step_folder(self.folder / run, self.steps)) as reader:
                keys = [f"{kind}/{parameter}" for kind in KINDS for parameter in reader.state["shapes"]]
                state = {key: reader.read_full(key) for key in keys}
                states.append(state | reader.read_shared() | {"slot": torch.tensor(reader.state["data"]["next_slot"])})
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def until(processes: list[subprocess.Popen[str]], happened: Callable[[], bool]) -> bool:
    """Whether it happened before a rank ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        if any(process.poll() is not None for process in processes):
            return False
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    outputs = [process.communicate(timeout=PATIENCE_SECONDS) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def kill(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
    ended(processes)


def test_killed_saved_stopped_and_damaged(tmp_path: Path) -> None:
    toy = Toy(tmp_path, 20)
    run = tmp_path / "broken"
    processes = toy.start("broken", "run.checkpoint_every=2", "run.snapshot_every=3")
    assert until(processes, lambda: toy.steps_of("broken") >= 3)
    kill(processes)
    # what a kill in the middle of a write leaves behind
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 99, "lo')

    # no checkpoint by itself, only when asked for one; once the file is gone, it is there
    (run / "SAVE").touch()
    processes = toy.start("broken", "run.checkpoint_every=0")
    assert until(processes, lambda: not (run / "SAVE").exists())
    asked = saved_steps(run)[-1]
    assert find_fault(step_folder(run, asked), contents=True) is None
    processes[1].send_signal(signal.SIGTERM)
    results = ended(processes)
    assert [code for code, _, _ in results] == [75, 75], results[0][2][-3000:]
    stopped = saved_steps(run)[-1]
    assert f"stopped at step {stopped}, checkpoint saved" in results[0][1] and asked < stopped

    flip_a_bit(step_folder(run, stopped) / "rank-00001-of-00002.safetensors", 0.5)
    (run / "checkpoints" / "latest").unlink()
    results = ended(toy.start("broken", "run.checkpoint_every=5", "run.snapshot_every=3"))
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert f"checkpoint step-{stopped:09d} is damaged" in results[0][1]
    assert f"resuming at step {asked} from" in results[0][1]
    toy.same("broken")
    assert saved_steps(run)[-1] == 20 and (run / "checkpoints" / "latest").read_text() == "step-000000020\n"
    assert saved_steps(run, SNAPSHOTS)[-1] == 18


@pytest.mark.slow
def test_twenty_runs_killed_at_random_moments(tmp_path: Path) -> None:
    toy = Toy(tmp_path, 40)
    deaths = lives = 0
    for number in range(20):
        draw, name = random.Random(number), f"run-{number}"
        every = draw.choice((1, 2, 3, 5))
        complete = False
        while not complete:
            lives += 1
            processes = toy.start(name, f"run.checkpoint_every={every}", "run.snapshot_every=4")
            if dies(toy, name, draw, processes):
                deaths += 1
                # a rank alone is often first, and the others notice
                processes[draw.randrange(2)].kill()
                time.sleep(draw.choice((0.0, 0.05, 0.5)))
                kill(processes)
            else:
                results = ended(processes)
                assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
                complete = True
        toy.same(name)
        shutil.rmtree(toy.folder / name)
        print(f"run {number}: checkpoints every {every} step(s), {deaths} deaths in {lives} lives so far", flush=True)


@pytest.mark.slow
def test_ten_runs_stopped_by_a_signal_to_one_rank(tmp_path: Path) -> None:
    toy = Toy(tmp_path, 40)
    stops = 0
    for number in range(10):
        draw, name = random.Random(number), f"run-{number}"
        while True:
            processes = toy.start(name, f"run.checkpoint_every={draw.choice((0, 3))}")
            # not before the run has begun: until then there is nothing to save, and the signal just ends the process
            if comes_to(toy, name, draw.randint(1, 20), processes):
                time.sleep(draw.uniform(0.0, 0.3))
                processes[draw.randrange(2)].send_signal(draw.choice((signal.SIGTERM, signal.SIGUSR1)))
            results = ended(processes)
            codes = [code for code, _, _ in results]
            assert codes in ([75, 75], [0, 0]), results[0][2][-3000:]
            if codes == [0, 0]:
                break
            stops += 1
            assert f"stopped at step {saved_steps(toy.folder / name)[-1]}, checkpoint saved" in results[0][1]
        toy.same(name)
        shutil.rmtree(toy.folder / name)
        print(f"run {number}: {stops} stops so far", flush=True)


def dies(toy: Toy, name: str, draw: random.Random, processes: list[subprocess.Popen[str]]) -> bool:
    """Wait for the moment of death, before the first step or some time after another; False if the end comes first."""
    if draw.random() < 0.15:
        time.sleep(draw.uniform(0.5, 6.0))
        return all(process.poll() is None for process in processes)
    if not comes_to(toy, name, draw.randint(1, 20), processes):
        return False
    time.sleep(draw.uniform(0.0, 0.3))
    return True


def comes_to(toy: Toy, name: str, steps: int, processes: list[subprocess.Popen[str]]) -> bool:
    """Wait until the run is so many steps beyond its checkpoint; False if a rank ends before."""
    began = toy.written_at(name)
    last = max(saved_steps(toy.folder / name), default=0) + steps
    return until(processes, lambda: toy.written_at(name) != began and toy.steps_of(name) >= last)
