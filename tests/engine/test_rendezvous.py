"""The variables of a launcher, and the address at which the ranks meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from commands import ENVIRONMENT
from drawn_images import packed_set
from hypothesis import given
from hypothesis import strategies as st
from ranks import free_port
from tiny_run import command, logged

from streamtrain.cli.launch import reserved_port
from streamtrain.engine import rendezvous
from streamtrain.engine.rendezvous import AGENT_STORE, Launch, check_master, meeting_error, wait_for_rank_0
from streamtrain.errors import ConfigError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
NAMES = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT", AGENT_STORE)
TWO = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher() -> Iterator[None]:
    before = dict(os.environ)
    for name in NAMES:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def used_port() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize(
    "variables",
    [
        {}, {"WORLD_SIZE": "1"}, {"RANK": "0"}, {"RANK": "", "WORLD_SIZE": ""},
        # a pod of one process
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "no.such.host", "MASTER_PORT": "23456"},
    ],
)  # fmt: skip
def test_a_lone_process_needs_no_launcher_and_no_address(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    assert Launch.from_environment() == Launch(0, 1, 0, 1)
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == [
        "0",
        "1",
        "0",
        "127.0.0.1",
    ]


def test_the_variables_of_launchers_are_read() -> None:
    os.environ.update({**TWO, "RANK": "1", "LOCAL_RANK": "1"})
    assert Launch.from_environment() == Launch(1, 2, 1, 2)
    os.environ["LOCAL_SIZE"] = "4"  # DeepSpeed's name, of a larger world
    os.environ["WORLD_SIZE"] = "8"
    assert Launch.from_environment() == Launch(1, 8, 1, 4)


def test_one_rank_of_torchrun_keeps_the_address_of_its_agent() -> None:
    os.environ.update({**TWO, "WORLD_SIZE": "1", AGENT_STORE: "True"})
    Launch.from_environment()
    assert os.environ["MASTER_PORT"] == "29500"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**TWO, "LOCAL_RANK": ""}, "WORLD_SIZE is 2, but LOCAL_RANK is not set.*LOCAL_WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2"}, "RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({**TWO, "MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({**TWO, "RANK": "one"}, "RANK is 'one', which is not a whole number"),
        ({**TWO, "RANK": "-1"}, "RANK is '-1'"),
        ({**TWO, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0', which is not a whole number of at least 1"),
        ({**TWO, "RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({**TWO, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1, but LOCAL_WORLD_SIZE is 1"),
        ({**TWO, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3, more than WORLD_SIZE"),
    ],
)
def test_variables_that_cannot_be_right_are_named(variables: dict[str, str], message: str) -> None:
    os.environ.update(variables)
    with pytest.raises(ConfigError, match=message):
        Launch.from_environment()


@given(st.dictionaries(st.sampled_from(NUMBERS), st.text("0123456789x -²", max_size=4)))
def test_any_variables_give_a_possible_launch_or_one_line(variables: dict[str, str]) -> None:
    for name in NAMES:
        os.environ.pop(name, None)
    os.environ.update({**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    try:
        launch = Launch.from_environment()
    except ConfigError as error:
        assert str(error).isprintable()
        return
    assert (
        0 <= launch.rank < launch.world_size and 0 <= launch.local_rank < launch.local_world_size <= launch.world_size
    )
    assert launch.cores >= 1 and os.environ["LOCAL_RANK"] == str(launch.local_rank)


# SLURM_CPUS_ON_NODE, cores that the process may use, ranks of the machine, and the cores of a rank
@pytest.mark.parametrize(
    ("on_node", "available", "is_task", "cores"),
    [
        ("8", 2, True, 2),  # each task is bound to its own
        ("8", 8, True, 2),  # the tasks share the cores of the job
        ("8", 64, True, 2),  # no limits: the job has a part of the machine
        ("8", 8, False, 2),  # torchrun in one task
        ("8", 4, False, 1),  # torchrun in a bound task
        (None, 8, False, 2),  # no Slurm
        ("", 2, True, 1),
    ],
)
def test_cores_are_divided_once(
    on_node: str | None, available: int, is_task: bool, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "available_cores", lambda: available)
    if on_node is not None:
        numbers = ("5", "1", "8") if is_task else ("1", "0", "2")
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        os.environ.update({"SLURM_CPUS_ON_NODE": on_node, **dict(zip(names, numbers, strict=True))})
    launch = Launch(5, 8, 1, 4)
    assert launch.cores == cores
    assert launch.has_own_cores == (cores == available)


def test_a_port_in_use_names_the_options_of_the_launchers(used_port: int) -> None:
    os.environ.update({**TWO, "MASTER_PORT": str(used_port)})
    with pytest.raises(ConfigError, match=rf"port {used_port}.*in use.*--master_port N \(deepspeed\)"):
        check_master(Launch(0, 2, 0, 2))
    check_master(Launch(1, 2, 1, 2))  # rank 0 listens there
    os.environ[AGENT_STORE] = "True"
    check_master(Launch(0, 2, 0, 2))  # torchrun listens there


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "9" * 5000, "²"])
def test_a_port_that_does_not_exist_is_named(port: str) -> None:
    os.environ.update({**TWO, "MASTER_PORT": port})
    with pytest.raises(ConfigError, match="which is not a port from 1 to 65535"):
        check_master(Launch(0, 2, 0, 2))


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a" * 300, "é.", "a b"])
def test_an_address_that_does_not_resolve_is_named(address: str) -> None:
    os.environ.update({**TWO, "MASTER_ADDR": address})
    with pytest.raises(ConfigError, match=r"MASTER_ADDR .* is not a known host"):
        check_master(Launch(1, 2, 1, 2), wait_seconds=0.0)


def test_rank_0_that_never_listens_is_an_error_after_the_timeout() -> None:
    os.environ.update({**TWO, "MASTER_PORT": str(free_port())})
    with pytest.raises(ConfigError, match=r"rank 1 of 2 could not meet .* \(limit 0.3 s: .*refused\)"):
        wait_for_rank_0(Launch(1, 2, 1, 2), timedelta(seconds=0.3))


def test_torch_errors_become_one_line() -> None:
    os.environ.update(TWO)
    launch, timeout = Launch(0, 2, 0, 2), timedelta(seconds=60)
    used = RuntimeError(
        "The server socket has failed to listen on any local network address. code: -98, name: EADDRINUSE"
    )
    assert "--master_port" in str(meeting_error(used, launch, timeout))
    late = RuntimeError(
        "Timed out after 61 seconds\nwaiting for clients. Exception raised from x (most recent call)\nframe"
    )
    text = str(meeting_error(late, launch, timeout))
    assert "waiting for clients." in text and "frame" not in text and "\n" not in text


def test_a_reserved_port_is_given_to_no_other_program_and_rank_0_can_listen() -> None:
    with reserved_port() as port:
        assert rendezvous._is_free(port)
        with socket.socket() as other, pytest.raises(OSError):
            other.bind(("", port))


@pytest.mark.slow
def test_a_second_run_beside_one_on_the_same_port_trains_or_is_one_line(used_port: int, tmp_path: Path) -> None:
    words = [sys.executable, *command(packed_set(tmp_path, 8).path, tmp_path / "run", "run.steps=1")]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(used_port), "RANK": "0"}
    two = ENVIRONMENT | address | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    ended = subprocess.run(words, env=two, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "--master_port" in ended.stderr, ended.stderr
    one = subprocess.run(words, env=ENVIRONMENT | address | {"WORLD_SIZE": "1"}, capture_output=True, text=True)
    assert one.returncode == 0 and list(logged(tmp_path / "run")) == [1], one.stderr


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_alone_ends_with_one_line(rank: int, tmp_path: Path) -> None:
    overrides = ("run.steps=1", "engine.collective_timeout_seconds=2")
    words = [sys.executable, *command(packed_set(tmp_path, 8).path, tmp_path / "run", *overrides)]
    variables = {**TWO, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(free_port())}
    ended = subprocess.run(words, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=120)
    # eight images and one step are warned of
    errors = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]
    assert ended.returncode == 1 and len(errors) == 1 and "could not meet" in errors[0], ended.stderr
