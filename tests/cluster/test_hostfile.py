"""``streamtrain train --hostfile`` on two machines with sshd: variables, quoting, exit statuses, lost machines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster.machines import PROGRAMS, Machine, ssh_folder, two_machines, why_not
from drawn_images import packed_set
from ranks import run_ranks
from tiny_run import command, logged

PROGRAMS_NEEDED = ("ssh", "sshd", "ssh-keygen")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS_NEEDED)), reason="needs ssh and sshd (Debian: openssh-client openssh-server)"
    ),
]
STEPS = 60
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(tmp_path / "machines") as pair:
        yield pair


@pytest.fixture
def start(machines: tuple[Machine, Machine], tmp_path: Path) -> Start:
    """Starts a run on the first machine, with a rank on each."""
    folder = ssh_folder(tmp_path / "ssh")
    for machine in machines:
        machine.serve_ssh(folder)
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1  # the other\n")

    def start_run(words: list[str], **variables: str) -> subprocess.Popen[str]:
        path = f"{folder}:{PROGRAMS}:/usr/sbin:/usr/bin:/sbin:/bin"
        return machines[0].start(
            [PROGRAMS / "streamtrain", "train", "--hostfile", hosts, *words[1:]], PATH=path, **variables
        )

    return start_run


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return packed_set(tmp_path, 24).path


def wait_for_steps(run: Path, steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(logged(run)) >= steps):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_both_train_and_stop_together_and_one_machine_continues(
    start: Start, machines: tuple[Machine, Machine], shards: Path, tmp_path: Path
) -> None:
    # characters of the shell
    run, project = tmp_path / "a & 'b' \"c\"; d", "$HOME `x` \\"
    words = command(shards, run, f"run.steps={STEPS}", "engine.environment=[MY_*]", f"monitor.project={project}")
    process = start(words, MY_OWN="x y $z", AWS_REGION="here", OTHER="not sent")
    wait_for_steps(run, 2, process)
    found = subprocess.run(
        machines[1].words(["sh", "-c", "cat /proc/$(pgrep -f '[m]ain.py.*run.steps=')/environ"]),
        capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    assert {"MY_OWN=x y $z", "AWS_REGION=here", "RANK=1"} <= set(found)
    assert not any(line.startswith("OTHER=") for line in found)
    assert yaml.safe_load((run / "config.yaml").read_text())["monitor"]["project"] == project
    (run / "STOP").touch()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in output, output
    assert output.count("stopped at step") == 1
    assert len(logged(run)) < STEPS
    assert [status for status, _, _ in run_ranks(words, 2)] == [0, 0]
    alone = [f"run.dir={tmp_path / 'alone'}" if str(word).startswith("run.dir=") else word for word in words]
    assert [status for status, _, _ in run_ranks(alone, 2)] == [0, 0]
    assert logged(run) == logged(tmp_path / "alone") and len(logged(run)) == STEPS


def test_ctrl_c_stops_both(start: Start, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(command(shards, run, "run.steps=10000"))
    wait_for_steps(run, 2, process)
    inside = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(inside[0] if inside else process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and output.count("stopped at step") == 1, output


def test_a_machine_without_the_set_ends_both_with_one_line(
    start: Start, machines: tuple[Machine, Machine], shards: Path, tmp_path: Path
) -> None:
    machines[1].run(f"mount -t tmpfs none {shards}")
    began = time.monotonic()
    process = start(command(shards, tmp_path / "run", "run.steps=2"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and time.monotonic() - began < 30
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == 1 and "node2 (rank 1): " in errors[0] and "is not a shard set" in errors[0], output


def test_a_machine_without_the_programs_ends_the_start_with_one_line(
    start: Start, machines: tuple[Machine, Machine], shards: Path, tmp_path: Path
) -> None:
    machines[1].run(f"mount -t tmpfs none {PROGRAMS}")
    process = start(command(shards, tmp_path / "run", "run.steps=2"))
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and len(output.splitlines()) == 1, output
    assert output.startswith("error: cannot start on node2: ") and "same paths" in output


def test_a_machine_that_cannot_be_reached_ends_the_start_with_one_line(
    start: Start, machines: tuple[Machine, Machine], shards: Path, tmp_path: Path
) -> None:
    machines[1].run("ip link set eth0 down")
    process = start(command(shards, tmp_path / "run", "run.steps=2"))
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 2 and len(output.splitlines()) == 1, output
    assert output.startswith("error: cannot start on node2: ")


def test_a_machine_that_goes_dark_ends_the_run_within_a_minute(
    start: Start, machines: tuple[Machine, Machine], shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(command(shards, run, "run.steps=10000"))
    wait_for_steps(run, 2, process)
    machines[1].run("ip link set eth0 down")
    began = time.monotonic()
    output, _ = process.communicate(timeout=70)
    assert process.returncode == 1 and time.monotonic() - began < 60
    assert "error: lost the connection to node2; run the same command again to resume" in output
    assert "Traceback" not in output
    # its ranks end too: they hear no longer from the first machine
    while subprocess.run(machines[1].words(["pgrep", "-f", "run.steps=10000"]), capture_output=True).stdout:
        assert time.monotonic() - began < 100
        time.sleep(0.5)
