"""The command of the container in ``examples/kubernetes.yaml``, on two machines that stand for its pods."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.machines import IPV4, Machine, two_machines, why_not
from drawn_images import packed_set
from ranks import ROOT, run_ranks
from tiny_run import command, logged

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(tmp_path / "machines") as pair:
        yield pair


@pytest.fixture(scope="module")
def container() -> Any:
    _, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes.yaml").read_text(encoding="utf-8"))
    return job["spec"]["template"]["spec"]["containers"][0]


def start_pod(machine: Machine, index: int, container: Any, words: list[Any]) -> subprocess.Popen[str]:
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    return machine.start([*container["command"], *words[1:]], JOB_COMPLETION_INDEX=str(index), **variables)


def test_an_evicted_pod_stops_both_and_new_pods_continue(
    machines: tuple[Machine, Machine], container: Any, tmp_path: Path
) -> None:
    shards, run = packed_set(tmp_path, 24).path, tmp_path / "run"
    words = command(shards, run, "run.steps=40")
    name = next(entry["value"] for entry in container["env"] if entry["name"] == "MASTER_ADDR")
    # the second pod is there first
    pods = [start_pod(machines[1], 1, container, words)]
    time.sleep(2)
    assert pods[0].poll() is None
    for machine in machines:
        address = "127.0.1.1" if machine is machines[0] else IPV4[0]
        machine.run(f"echo {address} {name} >> /etc/hosts")
    pods.append(start_pod(machines[0], 0, container, words))
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(logged(run)) >= 3):
        assert time.monotonic() < deadline and all(pod.poll() is None for pod in pods)
        time.sleep(0.1)
    # the container's first process
    machines[1].run("pkill -TERM -o -f '[s]treamtrain train'")
    outputs = [pod.communicate(timeout=60)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [75, 75], outputs
    assert len(logged(run)) < 40
    pods = [start_pod(machine, index, container, words) for index, machine in enumerate(machines)]
    outputs = [pod.communicate(timeout=120)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    assert [status for status, _, _ in run_ranks(command(shards, tmp_path / "one", "run.steps=40"), 2)] == [0, 0]
    assert logged(run) == logged(tmp_path / "one")


def test_a_pod_that_waits_for_the_name_of_the_first_ends_at_once(
    machines: tuple[Machine, Machine], container: Any, tmp_path: Path
) -> None:
    pod = start_pod(machines[1], 1, container, command(tmp_path / "set", tmp_path / "run"))
    time.sleep(1)
    machines[1].run("pkill -TERM -f '[t]rap'")
    assert pod.wait(10) == 75
