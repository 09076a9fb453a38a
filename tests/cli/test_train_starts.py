"""``streamtrain train``: starts that are refused or warned of, and a stop in the first step."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import COMMAND, ENVIRONMENT, run_command, started
from drawn_images import packed_set
from ranks import ROOT
from tiny_run import command

from streamtrain.run.directory import saved_steps
from streamtrain.run.signals import FIRST_STEP_SECONDS


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_set(tmp_path_factory.mktemp("starts"), 24).path


def words_of(shards: Path, run_dir: Path, *overrides: str) -> list[str]:
    return command(shards, run_dir, *overrides)[1:]


def test_a_run_of_too_much_memory_is_refused_without_loading_torch(shards: Path, tmp_path: Path) -> None:
    words = words_of(shards, tmp_path / "run", "data.micro_batch=100000000")
    # the process ends in os._exit, so a wrapper of it reports whether torch is loaded
    code = (
        "import os, sys; end = os._exit\n"
        "os._exit = lambda status: (print('torch' in sys.modules, flush=True), end(status))\n"
        f"from streamtrain.cli.main import main; main({['train', *words]})"
    )
    ended = subprocess.run(
        [COMMAND[0], "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2 and ended.stdout == "False\n", ended.stderr
    assert ended.stderr.count("\n") == 1 and "B of memory, but this machine has" in ended.stderr
    assert "--accept memory" in ended.stderr and not (tmp_path / "run").exists()


def test_a_short_try_out_starts_with_warnings(shards: Path, tmp_path: Path) -> None:
    words = words_of(shards, tmp_path / "run", "run.steps=1", "run.checkpoint_every=9", "schedules.weight_decay=0.1")
    ended = run_command("train", *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "run.steps 1 is too short for schedules.teacher_temperature.warmup 3000" in ended.stderr
    assert "never due within run.steps 1: run.checkpoint_every 9 (only the last step is saved)" in ended.stderr
    assert "schedules.weight_decay: peak 0.1; the recipe's shape is kept (cosine, end 0.4)" in ended.stdout
    assert saved_steps(tmp_path / "run") == [1]


@pytest.mark.parametrize("recorded", [pytest.param("constant", marks=pytest.mark.slow), "shape"])
def test_a_resumed_run_keeps_the_schedule_that_it_started_with(recorded: str, shards: Path, tmp_path: Path) -> None:
    """Also if it was started when a number was a constant, which the checkpoint records."""
    run_dir, number = tmp_path / "run", "schedules.weight_decay=0.1"
    constant = "schedules.weight_decay={kind: constant, peak: 0.1, end: null}"
    first = run_command(
        "train", *words_of(shards, run_dir, "run.steps=1", constant if recorded == "constant" else number)
    )
    assert first.returncode == 0, first.stderr[-3000:]
    again = run_command("train", *words_of(shards, run_dir, "run.steps=2", number))
    assert again.returncode == 0, again.stderr[-3000:]
    decays = [json.loads(line)["optim/weight_decay"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # the last step of a cosine has its end value
    assert decays == pytest.approx([0.1, 0.1] if recorded == "constant" else [0.4, 0.4])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stop_in_a_long_first_step_ends_the_process(
    number: signal.Signals, status: int, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # a ViT-S whose first step takes minutes on two cores
    words = ["--config", "vits16.yaml", f"data.shards={shards}", f"run.dir={run_dir}", "engine.device=cpu"]
    words += ["data.micro_batch=24", "data.global_batch=480", "crops.global_size=448", "monitor.tensorboard=false"]
    words += ["--accept", "memory"]
    with started("train", *words, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 240
        while not (run_dir / "config.yaml").exists():  # written shortly before the first step
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2)
        began = time.monotonic()
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        seconds = time.monotonic() - began
    print(f"ended {seconds:.1f} s after the signal")
    assert process.returncode == status and "Traceback" not in output
    assert saved_steps(run_dir) or seconds < FIRST_STEP_SECONDS + 5
    assert saved_steps(run_dir) or "nothing to save" in output or "before the first step" in output or status == 130
