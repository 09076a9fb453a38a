"""The job script of ``examples`` under a real Slurm on two machines ends as it says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.machines import why_not
from cluster.slurm import Slurm, slurm, why_no_slurm
from drawn_images import packed_set
from ranks import run_ranks
from tiny_run import command, logged

from streamtrain.run.directory import saved_steps

REASON = why_not() or why_no_slurm()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm") / "lab") as found:
        yield found


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_set(tmp_path_factory.mktemp("set"), 24).path


def words_of(shards: Path, run: Path, *overrides: str) -> list[str]:
    return [str(word) for word in command(shards, run, *overrides)[1:]]


def wait_for_steps(lab: Slurm, job: str, run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(logged(run)) >= steps):
        assert time.monotonic() < deadline, lab.output(job)
        time.sleep(0.1)


def signal_rank(lab: Slurm, name: str) -> None:
    """Send a signal to the rank of the second machine."""
    lab.machines[1].run(f"pkill -{name} -f '[s]treamtrain train'")


def test_a_job_survives_the_time_limit_and_a_killed_rank(lab: Slurm, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = lab.submit(words_of(shards, run, "run.steps=60"))
    wait_for_steps(lab, job, run, 3)
    # as before the time limit
    lab.run("scancel", "--batch", "--signal=USR1", job)
    lab.wait_for(job, "PENDING")
    done = len(logged(run))
    assert saved_steps(run)[-1] == done < 60
    lab.wait_for(job, "RUNNING")
    wait_for_steps(lab, job, run, done + 3)
    signal_rank(lab, "KILL")
    facts = lab.wait_for(job, "COMPLETED")
    assert (
        facts["Restarts"] == "2"
        and facts["ExitCode"] == "0:0"
        and "failures: 1" in lab.run("scontrol", "show", "job", job)
    )
    assert lab.output(job).count("the job is queued again and resumes from the latest checkpoint") == 2
    assert [status for status, _, _ in run_ranks(command(shards, tmp_path / "one", "run.steps=60"), 2)] == [0, 0]
    assert logged(run) == logged(tmp_path / "one")


def test_a_frozen_rank_ends_and_failures_are_bounded(lab: Slurm, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = words_of(shards, run, "run.steps=10000", "engine.collective_timeout_seconds=10")
    job = lab.submit(words, MAX_FAILURES="0")
    wait_for_steps(lab, job, run, 3)
    signal_rank(lab, "STOP")
    facts = lab.wait_for(job, "FAILED")
    assert facts["Restarts"] == "0" and "error: the ranks have failed, failures: 1" in lab.output(job)


def test_a_wrong_setting_fails_the_job(lab: Slurm, shards: Path, tmp_path: Path) -> None:
    job = lab.submit(words_of(shards, tmp_path / "run", "data.global_batch=7"))
    facts = lab.wait_for(job, "FAILED", seconds=30)
    assert facts["ExitCode"] == "2:0" and facts["Restarts"] == "0"
    # once on each machine, and once by srun
    lines = lab.output(job).splitlines()
    assert sum("global_batch 7 is not a multiple" in line for line in lines) == 2 and len(lines) == 4, lines


@pytest.mark.parametrize("how", ["scancel", "STOP"])
def test_a_job_that_is_stopped_saves_and_is_not_queued_again(
    how: str, lab: Slurm, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = lab.submit(words_of(shards, run, "run.steps=10000"))
    wait_for_steps(lab, job, run, 3)
    if how == "scancel":
        lab.run("scancel", job)
        facts = lab.wait_for(job, "CANCELLED")
    else:
        (run / "STOP").touch()
        facts = lab.wait_for(job, "FAILED")
        assert facts["ExitCode"] == "75:0"
    assert facts["Restarts"] == "0"
    assert saved_steps(run)[-1] == len(logged(run)) > 0
