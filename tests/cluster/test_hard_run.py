"""A run on two machines with a killed rank, a partition, stops and a move has the losses of an unbroken run."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cluster.machines import PROGRAMS, Machine, two_machines, why_not
from drawn_images import draw_folder
from ranks import ROOT, run_ranks
from tiny_run import command, logged

from shards.packing.pack import PackOptions, pack

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
STEPS = 100
# longer than the heartbeats of schedulers and of torchrun
PARTITION_SECONDS = 46
SERVER = """
import sys
from pathlib import Path
from faulty_server import FaultyServer
server = FaultyServer(Path(sys.argv[1]))
print(server.server_port, flush=True)
server.serve_forever()
"""
# the machine of each rank
PLACES = (0, 0, 1)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(tmp_path / "machines") as pair:
        yield pair


def start(pair: Sequence[Machine], words: Sequence[Sequence[object]]) -> list[subprocess.Popen[str]]:
    """Start three ranks, two on the first machine; ``words``: of each machine."""
    processes = []
    for rank, place in enumerate(PLACES):
        numbers = {
            "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(PLACES[:rank].count(place)),
            "LOCAL_WORLD_SIZE": str(PLACES.count(place)), "MASTER_ADDR": "node1", "MASTER_PORT": "29511",
        }  # fmt: skip
        processes.append(pair[place].start([PROGRAMS / "python", *words[place]], **numbers))
    return processes


def wait_for_steps(run: Path, steps: int, ranks: Sequence[subprocess.Popen[str]], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ((run / "metrics.jsonl").exists() and len(logged(run)) >= steps):
        ended = [rank.communicate()[0][-2000:] for rank in ranks if rank.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.1)


def test_a_run_through_all_faults_has_the_losses_of_an_unbroken_one(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    # several shards, so that each machine copies others
    pack(draw_folder(tmp_path / "images", 48), tmp_path / "set", PackOptions(shard_bytes=8_000))
    run, common = tmp_path / "run", (f"run.steps={STEPS}", "data.lanes=3", "data.window=1")
    words, servers = [], []
    for machine in machines:
        server = machine.start([PROGRAMS / "python", "-c", SERVER, tmp_path], PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}/set"
        cache = f"data.cache={{dir: {tmp_path / f'cache of {machine.name}'}, limit: 1MB}}"
        words.append(command(url, run, *common, cache))
        servers.append(server)

    ranks = start(machines, words)
    wait_for_steps(run, 4, ranks)
    machines[1].run("pkill -KILL -f '[m]ain.py'")
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1, -9], outputs

    ranks = start(machines, words)
    done = len(logged(run))
    wait_for_steps(run, done + 4, ranks)
    machines[1].run("ip link set eth0 down")
    time.sleep(PARTITION_SECONDS)
    done = len(logged(run))
    machines[1].run("ip link set eth0 up")
    # lost packets are sent again after up to as long as the partition took
    wait_for_steps(run, done + 4, ranks, 2 * PARTITION_SECONDS)
    machines[1].run("pkill -TERM -f '[m]ain.py'")
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75, 75], outputs

    ranks = start(machines, words)
    done = len(logged(run))
    wait_for_steps(run, done + 4, ranks)
    machines[0].run(f"touch {run}/STOP")
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75, 75], outputs
    assert len(logged(run)) < STEPS

    for machine in machines:
        assert list((tmp_path / f"cache of {machine.name}").glob("*.shard"))
    assert [status for status, _, _ in run_ranks(command(tmp_path / "set", run, *common), 3)] == [0, 0, 0]
    unbroken = command(tmp_path / "set", tmp_path / "one", *common)
    assert [status for status, _, _ in run_ranks(unbroken, 3)] == [0, 0, 0]
    assert logged(run) == logged(tmp_path / "one") and len(logged(run)) == STEPS
