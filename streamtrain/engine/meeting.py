"""How the ranks of a run meet: through a store that no earlier attempt has written to, once all agree on the start.

torchrun keeps one store for all attempts of a run. Without the exchange below, a restarted rank reads the address that
a dead peer left there, and waits for it until the time-out.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from streamtrain.engine.rendezvous import AGENT_STORE, MEETING_ADVICE, Launch, meeting_error, wait_for_rank_0
from streamtrain.errors import StreamtrainError

if TYPE_CHECKING:
    from torch.distributed import Store

# how long rank 0 stays after a failed start, unless all ranks know: others may still import from a slow disk
TELL_SECONDS = 60.0
# how long a new file in a network folder may take to appear on another machine
FOLDER_SECONDS = 5.0
# of a value in a message
_MAX_CHARACTERS = 80
_POLL_SECONDS = 0.05
# beyond this number of ranks each asks less often, so that the store has time to answer
_QUICK_RANKS = 50


class FailedStart(StreamtrainError):
    """The run does not start; every rank raises this with the same message.

    Attributes:
        is_temporary: another start may succeed.
    """

    def __init__(self, message: str, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary


@dataclass(frozen=True)
class StartFacts:
    """Facts that must be equal on all ranks.

    Attributes:
        values: by the name that a message uses.
        folder: shared by all ranks; rank 0 can write to it.
    """

    values: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class _Report:
    """The state of a rank before the start; ``address`` is that of rank 0's machine, as this rank reaches it."""

    rank: int
    host: str
    address: str
    error: str | None
    values: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.host} (rank {self.rank})"


def meet(launch: Launch, timeout: timedelta, facts: StartFacts | None = None, error: str | None = None) -> Store:
    """Wait for all ranks, and return a store for their process group.

    Args:
        timeout: until all ranks have come.
        facts: must be equal on all ranks.
        error: why this rank cannot start, for the other ones.

    Raises:
        FailedStart: a rank has an error, does not agree with rank 0, or has not come in time.
        MeetingError: the ranks cannot reach each other.
    """
    from torch.distributed import HashStore, PrefixStore, TCPStore

    if launch.world_size == 1:
        return HashStore()
    serves = launch.rank == 0 and os.environ.get(AGENT_STORE) != "True"
    address = "127.0.0.1" if serves else wait_for_rank_0(launch, timeout)
    own = _Report(launch.rank, socket.gethostname(), address, error, dict((facts or StartFacts()).values))
    folder = facts.folder if facts else None
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), launch.world_size, serves, timeout,
            wait_for_workers=False,
        )  # fmt: skip
        if launch.rank == 0:
            name, address = _receive(store, own, launch.world_size, timeout, folder)
        else:
            pause = _POLL_SECONDS * max(1.0, launch.world_size / _QUICK_RANKS)
            name, address = _come(store, own, timeout, folder, pause)
    except (RuntimeError, OSError) as failure:
        raise meeting_error(failure, launch, timeout) from None
    choose_interface(address)
    return PrefixStore(name, store)


def _come(store: Store, own: _Report, timeout: timedelta, folder: Path | None, pause: float) -> tuple[str, str]:
    """Report to rank 0; return the name of the meeting and the address of rank 0's machine.

    ``pause``: between two questions to the store, in seconds.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    word = secrets.token_hex(8)
    store.set(f"hello/{own.rank}", word)
    # only a rank 0 that is alive can have read this word
    name = _wait(store, f"welcome/{own.rank}/{word}", deadline, pause)
    error = own.error
    if error is None and folder is not None and not _sees(store, folder, name, pause):
        error = f"{folder} is not the folder of rank 0; run.dir must be on storage that all machines share"
    store.set(f"{name}/report/{own.rank}", json.dumps({**asdict(own), "error": error}))
    verdict = json.loads(_wait(store, f"{name}/verdict", deadline, pause))
    store.add(f"{name}/told", 1)
    if verdict["fault"]:
        raise FailedStart(verdict["fault"], verdict["is_temporary"])
    return name, verdict["address"]


def _receive(
    store: Store, own: _Report, world_size: int, timeout: timedelta, folder: Path | None
) -> tuple[str, str]:  # fmt: skip
    """Wait for the reports of all ranks and tell them whether the run starts; return the same as ``_come``."""
    deadline = time.monotonic() + timeout.total_seconds()
    name = secrets.token_hex(8)
    reports, words = {0: own}, dict.fromkeys(range(1, world_size), "")
    fault, is_temporary = "", False

    def tell(text: str) -> None:
        addresses = [report.address for _, report in sorted(reports.items()) if not _is_loopback(report.address)]
        verdict = {"fault": text, "is_temporary": is_temporary, "address": next(iter(addresses), own.address)}
        store.set(f"{name}/verdict", json.dumps(verdict))

    with _marked(folder if own.error is None else None, name) as is_marked:
        if not is_marked:
            store.set(f"{name}/unmarked", "")
        while True:
            for rank in words:
                if rank not in reports:
                    _answer(store, name, rank, words, reports)
            failed = [f"{report.place}: {report.error}" for report in reports.values() if report.error]
            if failed and not fault:
                fault = failed[0]
                tell(fault)
                deadline = min(deadline, time.monotonic() + TELL_SECONDS)
            if len(reports) == world_size or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
    if not fault:
        missing = [str(rank) for rank in words if rank not in reports]
        is_temporary = bool(missing)
        fault = _absence(missing, timeout.total_seconds()) if missing else _difference(list(reports.values()))
        tell(fault)
    if not fault:
        return name, json.loads(store.get(f"{name}/verdict"))["address"]
    # the store may end with this process
    deadline = time.monotonic() + TELL_SECONDS
    while store.add(f"{name}/told", 0) < len(reports) - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    raise FailedStart(fault, is_temporary)


def _answer(store: Store, name: str, rank: int, words: dict[int, str], reports: dict[int, _Report]) -> None:
    """Read the report of a rank if it is there, otherwise answer its greeting; a dead peer's is answered in vain."""
    if store.check([f"{name}/report/{rank}"]):
        reports[rank] = _Report(**json.loads(store.get(f"{name}/report/{rank}")))
    elif store.check([f"hello/{rank}"]) and (word := store.get(f"hello/{rank}").decode()) != words[rank]:
        store.set(f"welcome/{rank}/{word}", name)
        words[rank] = word


def _wait(store: Store, key: str, deadline: float, pause: float) -> str:
    """Return the value of a key when it is set; raises TimeoutError."""
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise TimeoutError("rank 0 does not answer")
        time.sleep(pause)
    return store.get(key).decode()


def _absence(missing: list[str], seconds: float) -> str:
    shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return f"rank 0 could not meet rank{'s' * (len(missing) > 1)} {shown} within {seconds:g} s; {MEETING_ADVICE}"


def _difference(reports: list[_Report]) -> str:
    """Return how the first rank that differs from rank 0 does so, or an empty text."""
    own, *others = reports
    for other in sorted(others, key=lambda report: report.rank):
        for key in sorted(own.values.keys() | other.values.keys()):
            mine, theirs = own.values.get(key, "missing"), other.values.get(key, "missing")
            if mine != theirs:
                return (
                    f"the ranks differ: {key} is {_short(theirs)} on {other.place} and {_short(mine)} on {own.place}; "
                    "all machines need the same settings, images and versions"
                )
    return ""


def _short(value: str) -> str:
    return value if len(value) <= _MAX_CHARACTERS else f"{value[:_MAX_CHARACTERS]}..."


@contextmanager
def _marked(folder: Path | None, name: str) -> Iterator[bool]:
    """Keep an empty file in ``folder`` during the ``with`` block; other ranks recognise the folder by it.

    Yields whether the file exists: training continues on a full disk.
    """
    mark = None if folder is None else _mark(folder, name)
    try:
        if mark is not None:
            mark.touch()
    except OSError:
        mark = None
    try:
        yield mark is not None
    finally:
        if mark is not None:
            with suppress(OSError):
                mark.unlink()


def _mark(folder: Path, name: str) -> Path:
    return folder / f".meeting-{name}"


def _sees(store: Store, folder: Path, name: str, pause: float) -> bool:
    """Return whether rank 0's file appears in ``folder``; also if rank 0 made none, or ends the start anyway."""
    deadline = time.monotonic() + FOLDER_SECONDS
    while time.monotonic() < deadline:
        if any(store.check([f"{name}/{key}"]) for key in ("unmarked", "verdict")):
            return True
        # a network file system may have cached that the file is missing; listing the folder renews that
        with suppress(OSError):
            if _mark(folder, name).name in os.listdir(folder):
                return True
        time.sleep(pause)
    return False


def choose_interface(address: str) -> None:
    """Let gloo and NCCL use the network interface through which ``address`` is reached, unless the user chose one.

    Left alone, gloo takes the address of the machine's name, which Debian's /etc/hosts gives as 127.0.1.1.
    """
    name = interface_towards(address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if not _is_loopback(address):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_towards(address: str) -> str | None:
    """Return the name of this machine's network interface that leads to an IP address; None if it is not found."""
    import psutil

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # chooses a route and sends nothing
            probe.connect((address, 9))
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own.partition("%")[0] for each in addresses):
            return name
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
