"""Ranks meet through a store that no earlier attempt has written to, once all agree on the start."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import pytest
from commands import ENVIRONMENT
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import free_port
from torch.distributed import TCPStore

from streamtrain.engine import meeting
from streamtrain.engine.meeting import FailedStart, StartFacts, choose_interface, interface_towards, meet
from streamtrain.engine.rendezvous import AGENT_STORE, Launch
from streamtrain.errors import ConfigError

TIMEOUT = timedelta(seconds=20)


@pytest.fixture(autouse=True)
def own_variables() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), AGENT_STORE: "False"})
    yield
    os.environ.clear()
    os.environ.update(before)


def outcomes(facts: list[StartFacts], errors: list[str | None] | None = None, pause: float = 0.0) -> list[str]:
    """Let one thread per rank meet, rank 0 first; return for each rank its error, or the values of all others."""
    world = len(facts)
    everybody = Barrier(world)

    def run(rank: int) -> str:
        if rank:
            time.sleep(pause)
        try:
            store = meet(Launch(rank, world, rank, world), TIMEOUT, facts[rank], errors[rank] if errors else None)
        except FailedStart as error:
            return str(error)
        # what one rank writes, all can read
        store.set(f"from {rank}", str(rank))
        read = " ".join(store.get(f"from {other}").decode() for other in range(world))
        # rank 0's store ends with it
        everybody.wait(20)
        return read

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


@settings(max_examples=8)
@given(st.integers(2, 5), st.data())
def test_all_ranks_start_or_all_give_the_same_reason(world: int, data: st.DataObject) -> None:
    os.environ["MASTER_PORT"] = str(free_port())
    other = data.draw(st.integers(1, world - 1))
    kind = data.draw(st.sampled_from(("equal", "other value", "missing", "error")))
    facts = [StartFacts({"objective.koleo.weight": "0.1", "seed": "0"}) for _ in range(world)]
    errors: list[str | None] = [None] * world
    if kind == "other value":
        facts[other] = StartFacts({"objective.koleo.weight": "0.2", "seed": "0"})
    elif kind == "missing":
        facts[other] = StartFacts({"objective.koleo.weight": "0.1"})
    elif kind == "error":
        errors[other] = "the disk is full"
    found = outcomes(facts, errors)
    assert len(set(found)) == 1
    place = f"{socket.gethostname()} (rank {other})"
    if kind == "equal":
        assert found[0] == " ".join(map(str, range(world)))
    elif kind == "error":
        assert found[0] == f"{place}: the disk is full"
    else:
        assert (
            place in found[0] and ("objective.koleo.weight is 0.2" if kind == "other value" else "missing") in found[0]
        )


def test_an_error_of_rank_0_reaches_ranks_that_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcomes([StartFacts()] * 3, ["no such set", None, None])
    assert found == [f"{socket.gethostname()} (rank 0): no such set"] * 3


def test_what_dead_peers_left_in_the_store_is_not_used() -> None:
    # torchrun's agent serves the same store to all attempts
    os.environ[AGENT_STORE] = "True"
    agent = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 3, True, TIMEOUT, wait_for_workers=False)
    for rank in (1, 2):
        agent.set(f"hello/{rank}", "dead")
    # so late that rank 0 answers the dead ones first
    for pause in (0.3, 0.0, 0.3):
        assert outcomes([StartFacts()] * 3, pause=pause) == ["0 1 2"] * 3
    assert agent.check(["welcome/1/dead"])


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
@pytest.mark.parametrize("dies", [0, 1])
def test_torchrun_restarts_a_killed_rank(rendezvous: str, dies: int) -> None:
    """Five times in a row, with each of two launchers and each of two ranks."""
    start = ["torchrun", "--max-restarts", "5", "--nproc_per_node", "2"]
    if rendezvous == "c10d":
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    else:
        start += ["--master_port", str(free_port())]
    # all attempts but the last lose a rank
    words = [
        Path(sys.executable).with_name(start[0]),
        *start[1:],
        Path(__file__).with_name("dying_rank.py"),
        str(dies),
        "5",
    ]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("attempt 5 has 2 ranks") == 2


def test_folders_that_are_not_shared_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "FOLDER_SECONDS", 0.2)
    folders = [tmp_path / name for name in ("one", "two")]
    folders[0].mkdir()
    found = outcomes([StartFacts(folder=folder) for folder in (folders[0], *folders)])
    assert len(set(found)) == 1 and f"(rank 2): {folders[1]} is not the folder of rank 0" in found[0]
    os.environ["MASTER_PORT"] = str(free_port())
    assert outcomes([StartFacts(folder=folders[0])] * 3) == ["0 1 2"] * 3
    assert not os.listdir(folders[0])


def test_a_folder_without_space_for_the_mark_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", fail)
    assert outcomes([StartFacts(folder=tmp_path)] * 2) == ["0 1"] * 2


def test_ranks_that_do_not_come_are_counted() -> None:
    with pytest.raises(FailedStart, match=r"could not meet ranks 1, 2 within 0\.3 s"):
        meet(Launch(0, 3, 0, 3), timedelta(seconds=0.3))


def test_a_rank_0_that_does_not_answer_ends_the_wait() -> None:
    os.environ[AGENT_STORE] = "True"
    agent = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, True, TIMEOUT, wait_for_workers=False)
    with pytest.raises(ConfigError, match="rank 0 does not answer"):
        meet(Launch(1, 2, 1, 2), timedelta(seconds=0.3))
    assert agent.num_keys()


def test_a_lone_rank_needs_no_network() -> None:
    os.environ.update({"MASTER_ADDR": "no.such.host"})
    meet(Launch(0, 1, 0, 1), TIMEOUT).set("key", "value")


def test_the_interface_that_reaches_an_address() -> None:
    loopback = interface_towards("127.0.0.1")
    assert loopback in {name for _, name in socket.if_nameindex()}
    assert interface_towards("127.0.1.1") == loopback


def test_an_interface_that_the_user_chose_is_kept() -> None:
    os.environ.pop("NCCL_SOCKET_IFNAME", None)
    os.environ["GLOO_SOCKET_IFNAME"] = "mine"
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine" and "NCCL_SOCKET_IFNAME" not in os.environ


def test_a_long_value_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcomes([StartFacts({"key": json.dumps(["a" * 1000])}), StartFacts({"key": "b" * 1000})])
    assert len(found[0]) < 500
