"""Two machines train as one does, and a mistake on one of them ends both within seconds."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cluster.machines import IPV4, IPV6, PROGRAMS, Machine, two_machines, why_not
from drawn_images import packed_set
from ranks import run_ranks
from tiny_run import command, logged

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
STEPS = 12
Pair = tuple[Machine, Machine]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Pair]:
    with two_machines(tmp_path / "machines") as pair:
        yield pair


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_set(tmp_path_factory.mktemp("set"), 24).path


@pytest.fixture(scope="module")
def one_machine(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks on this machine."""
    run = tmp_path_factory.mktemp("one") / "run"
    done = run_ranks(command(shards, run, f"run.steps={STEPS}"), 2)
    assert [status for status, _, _ in done] == [0, 0], done[0][2][-2000:]
    return run


def ends(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[tuple[int, list[str]]]:
    """Wait for the ranks; return the exit status and the errors of each."""
    deadline = time.monotonic() + seconds
    outputs = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0] for process in processes]
    # ranks other than 0 write their number first
    errors = [[line for line in output.splitlines() if "error: " in line[:20]] for output in outputs]
    assert not any("Traceback" in output for output in outputs), outputs
    return [(process.returncode, lines) for process, lines in zip(processes, errors, strict=True)]


@pytest.mark.parametrize(("addresses", "master"), [(IPV4, "node1"), (IPV4, IPV4[0]), (IPV6, "node1")])
def test_losses_are_those_of_one_machine(
    addresses: tuple[str, str], master: str, shards: Path, one_machine: Path, tmp_path: Path
) -> None:
    words = command(shards, tmp_path / "run", f"run.steps={STEPS}")
    with two_machines(tmp_path / "machines", addresses) as pair:
        ranks = [machine.start_rank(rank, master, words) for rank, machine in enumerate(pair)]
        assert ends(ranks, 120) == [(0, []), (0, [])]
    assert logged(tmp_path / "run") == logged(one_machine)


def test_torchrun_starts_again_after_a_rank_was_killed(
    machines: Pair, shards: Path, one_machine: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start = [
        "torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "2", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "node1:29400", *command(shards, run, f"run.steps={STEPS}"),
    ]  # fmt: skip
    agents = [machine.start(start) for machine in machines]
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and len(logged(run)) >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pattern = shlex.quote(f"^{PROGRAMS}/python.* -u .*main.py")
    machines[1].run(f"kill -9 $(pgrep -f {pattern})")
    for agent in agents:
        output, _ = agent.communicate(timeout=200)
        assert agent.returncode == 0, output[-3000:]
    assert logged(run) == logged(one_machine)


@pytest.mark.parametrize("kind", ["no set", "other set", "other setting", "run.dir is not shared"])
@pytest.mark.parametrize("wrong", [0, 1])
def test_a_mistake_on_one_machine_ends_both(
    kind: str, wrong: int, machines: Pair, shards: Path, tmp_path: Path
) -> None:
    runs, sets, overrides = [tmp_path / "run"] * 2, [shards] * 2, [["run.steps=2"], ["run.steps=2"]]
    expected = ""
    if kind == "no set":
        sets[wrong], expected = tmp_path / "missing", "no shard set at "
    elif kind == "other set":
        (tmp_path / "other").mkdir()
        sets[wrong], expected = packed_set(tmp_path / "other", 28).path, "the digest of the images is "
    elif kind == "other setting":
        overrides[wrong].append("run.seed=7")
        expected = "run.seed is "
    else:
        runs[wrong], expected = tmp_path / "elsewhere", "is not the folder of rank 0"
    began = time.monotonic()
    ranks = [
        machine.start_rank(rank, "node1", command(sets[rank], runs[rank], *overrides[rank]))
        for rank, machine in enumerate(machines)
    ]
    found = ends(ranks, 90)
    assert [status for status, _ in found] == [2, 2] and time.monotonic() - began < 60
    # the same line on both
    assert all(len(lines) == 1 and expected in lines[0] for _, lines in found), found
    # another folder is a mistake of the rank that is not rank 0
    place = "node2 (rank 1)" if "is not the folder" in expected else f"node{wrong + 1} (rank {wrong})"
    assert place in found[1 - wrong][1][0]


def test_a_name_that_nobody_knows_ends_the_start(machines: Pair, shards: Path, tmp_path: Path) -> None:
    words = command(shards, tmp_path / "run", "run.steps=2")
    began = time.monotonic()
    ranks = [machine.start_rank(rank, "no.such.host", words) for rank, machine in enumerate(machines)]
    found = ends(ranks, 90)
    assert [status for status, _ in found] == [2, 2] and time.monotonic() - began < 60
    assert all(len(lines) == 1 and "MASTER_ADDR 'no.such.host' is not a known host" in lines[0] for _, lines in found)
