"""A rank that hangs: the others write their stacks to the run directory and exit."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from drawn_images import packed_set
from ranks import ROOT, free_port, start_ranks
from tiny_run import command

TIMEOUT = 5


@pytest.mark.parametrize("key", ["collective_timeout_seconds", "hang_timeout_seconds"])
def test_a_stopped_rank_ends_the_others(tmp_path: Path, key: str) -> None:
    shards, run = packed_set(tmp_path, 24).path, tmp_path / "run"
    words = command(shards, run, "run.steps=1000000", "run.checkpoint_every=0", f"engine.{key}={TIMEOUT}")
    processes = start_ranks(words, 2)
    try:
        wait_for_steps(run, 3, 100)
        processes[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        _, errors = processes[0].communicate(timeout=60)
        took = time.monotonic() - stopped
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    (stacks,) = (run / "stacks").glob("*-rank-00000.txt")
    text = stacks.read_text()
    assert "in train" in text and 'File "' in text
    if key == "hang_timeout_seconds":
        assert processes[0].returncode == 70
        assert f"rank 0 made no progress for 5 s (engine.{key}); the stacks of its threads are in {stacks}" in errors
    else:
        assert processes[0].returncode == 1 and "Traceback" not in errors and "Traceback" in text
        assert "error: rank 0: a collective operation failed (Timed out " in errors
    print(f"{key}: ended {took:.1f} s after the other rank was stopped")
    assert TIMEOUT - 1 < took < TIMEOUT + 15


def test_a_hung_process_ends_without_memory_for_another_thread(tmp_path: Path) -> None:
    program = """
import faulthandler, sys, time
from pathlib import Path
from streamtrain.diagnostics.hang_detector import HangDetector
def fail(*_, **__):
    raise RuntimeError("unable to start watchdog thread")
faulthandler.dump_traceback_later = fail
with HangDetector(Path(sys.argv[1]), 0, 0.3):
    time.sleep(60)
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 70 and "rank 0 made no progress" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launcher_restarts_and_the_run_completes(tmp_path: Path, launcher: str) -> None:
    shards, run = packed_set(tmp_path, 24).path, tmp_path / "run"
    words = command(shards, run, "run.steps=40", f"engine.collective_timeout_seconds={TIMEOUT}")
    programs, port = Path(sys.executable).parent, str(free_port())
    if launcher == "torchrun":
        start = ["torchrun", "--max-restarts", "2", "--nproc_per_node", "2", "--master_port", port, *words]
    else:
        again = f"deepspeed --num_gpus 2 --master_port {port} {shlex.join(words)}"
        start = ["bash", "-c", f"for attempt in 1 2 3; do {again} && exit 0; done; exit 1"]
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(start, env={**os.environ, **path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        wait_for_steps(run, 3, 100)
        (rank,) = [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if is_rank(folder, run, "1")]
        os.kill(rank, signal.SIGSTOP)
        output = process.communicate(timeout=300)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41)) and len(list((run / "stacks").iterdir())) == 1


def is_rank(folder: Path, run: Path, rank: str) -> bool:
    """Return whether a process in ``/proc`` is the given rank of a run."""
    try:
        words, variables = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
    except OSError:
        return False
    main = any(word.endswith(b"main.py") for word in words[:4])
    return main and f"run.dir={run}".encode() in words and f"RANK={rank}".encode() in variables


def wait_for_steps(run: Path, steps: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)
