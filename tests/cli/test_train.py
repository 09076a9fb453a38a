"""``streamtrain train`` starts the ranks, stops them after a checkpoint and returns their exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import COMMAND, ENVIRONMENT, run_command
from drawn_images import packed_set
from ranks import ROOT, free_port, run_ranks
from tiny_run import command, logged

from streamtrain.run.directory import saved_steps


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_set(tmp_path_factory.mktemp("train"), 24).path


def train_words(shards: Path | str, run_dir: Path, *overrides: str) -> list[str]:
    """The options and overrides of a tiny run, without the script."""
    return command(shards, run_dir, *overrides)[1:]


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "train", *words], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_step(run_dir: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_ranks_train_and_overrides_may_come_anywhere(shards: Path, tmp_path: Path) -> None:
    words = train_words(shards, tmp_path / "run", "run.steps=2")
    ended = run_command("train", "run.seed=3", "--gpus", 2, *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(logged(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "checkpoints" / "step-000000002" / "rank-00001-of-00002.safetensors").is_file()
    assert "seed: 3" in (tmp_path / "run" / "config.yaml").read_text()
    again = run_command("train", "run.seed=3", "--ranks", 2, *words)
    assert again.returncode == 0 and "run.steps" in again.stdout and again.stderr == ""


def test_one_rank_needs_no_launcher(shards: Path, tmp_path: Path) -> None:
    """Without --gpus and without a GPU there is one rank, in the process of the command."""
    with started(*train_words(shards, tmp_path / "run", "run.steps=10000")) as process:
        wait_for_step(tmp_path / "run", process)
        assert not any("main.py" in Path(f"/proc/{child}/cmdline").read_text() for child in children_of(process.pid))
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 75 and "Traceback" not in errors


def test_ranks_of_a_hostfile_start_through_deepspeed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for ssh, which prints the address of the host."""
    (tmp_path / "ssh").write_text("#!/bin/sh\necho 127.0.0.1\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    words = train_words(shards, tmp_path / "run", "run.steps=1")
    ended = run_command("train", "--hostfile", tmp_path / "hosts", *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "step-000000001" / "rank-00001-of-00002.safetensors").is_file()


def test_a_process_with_a_rank_runs_as_that_rank(shards: Path, tmp_path: Path) -> None:
    """As in ``srun streamtrain train ...``, with RANK and the other variables set."""
    words = ["-m", "streamtrain.cli.main", "train", *train_words(shards, tmp_path / "run", "run.steps=1")]
    results = run_ranks(words, 2, fresh=True)
    assert [status for status, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert (tmp_path / "run" / "checkpoints" / "step-000000001" / "rank-00001-of-00002.safetensors").is_file()


@pytest.mark.parametrize(
    "launcher",
    [
        # two ranks of a host file start through it too
        pytest.param(
            ["deepspeed", "--num_gpus", "1", "--master_port", "{port}", "--module"],
            id="deepspeed",
            marks=pytest.mark.slow,
        ),
        ["torchrun", "--nproc_per_node", "1", "--master_port", "{port}", "-m"],
        ["python", "-m"],
    ],
    ids=lambda words: words[0],
)
def test_launchers_start_the_module(launcher: list[str], shards: Path, tmp_path: Path) -> None:
    """From another folder, so that the module cannot come from the working directory."""
    bin_folder = Path(sys.executable).parent
    environment = {**ENVIRONMENT, "PATH": f"{bin_folder}{os.pathsep}{ENVIRONMENT['PATH']}"}
    words = [word.format(port=free_port()) for word in launcher]
    command = [*words, "streamtrain.main", *train_words(shards, tmp_path / "run", "run.steps=1")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert list(logged(tmp_path / "run")) == [1]


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_to_the_command_stops_all_ranks_after_a_checkpoint(
    number: signal.Signals, status: int, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = train_words(shards, run_dir, "run.steps=10000", "run.checkpoint_every=0")
    with started("--ranks", "2", *words) as process:
        wait_for_step(run_dir, process)
        ranks = children_of(process.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == status, errors[-3000:]
    assert "Traceback" not in errors and "error: rank" not in errors
    assert saved_steps(run_dir)[-1] == len(logged(run_dir)) > 0
    assert len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_ranks_stop_after_a_checkpoint_when_the_command_is_killed(shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = train_words(shards, run_dir, "run.steps=10000", "run.checkpoint_every=0")
    with started("--ranks", "2", *words) as process:
        wait_for_step(run_dir, process)
        ranks = children_of(process.pid)
        process.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{rank}/exe").exists() for rank in ranks):
            assert time.monotonic() < deadline, "ranks outlive the command"
            time.sleep(0.1)
    assert saved_steps(run_dir)


def test_a_killed_rank_ends_the_others_and_sets_the_exit_status(shards: Path, tmp_path: Path) -> None:
    with started("--ranks", "2", *train_words(shards, tmp_path / "run", "run.steps=10000")) as process:
        wait_for_step(tmp_path / "run", process)
        os.kill(children_of(process.pid)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: rank 1 ended with exit status 137" in errors.splitlines(), errors


@pytest.mark.parametrize(
    ("ranks", "overrides", "message"),
    [
        ([], ["data.shards=nowhere"], "no shard set at nowhere"),
        (["--ranks", "2"], ["data.shards=nowhere"], "no shard set at nowhere"),
        (["--ranks", "2"], ["model.dpeth=3"], "did you mean model.depth"),
        (["--ranks", "2"], ["data.global_batch=7"], "global_batch"),
        (["--hostfile", "nowhere"], [], "--hostfile nowhere does not exist"),
    ],
)
def test_a_user_error_is_one_line(
    ranks: list[str], overrides: list[str], message: str, shards: Path, tmp_path: Path
) -> None:
    ended = run_command("train", *ranks, *train_words(shards, tmp_path / "run", *overrides))
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and message in ended.stderr
    assert not (tmp_path / "run").exists()
