"""Start the ranks of a training run on this machine and forward stop signals to them.

The launchers of PyTorch and DeepSpeed kill the ranks 30 s after a signal and exit with status 1. But a stop takes one
step and one checkpoint, and schedulers need the run's own exit status (75 or 130).
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streamtrain.engine.rendezvous import AGENT_STORE
from streamtrain.errors import StreamtrainError
from streamtrain.run.signals import EXIT_DRIFTED, EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USAGE, STOP_STATUSES

if TYPE_CHECKING:
    from streamtrain.cli.hosts import Host

SCRIPT = Path(__file__).resolve().parents[1] / "main.py"
# the ranks have already reported the reason
_EXPLAINED_STATUSES = (EXIT_USAGE, EXIT_DRIFTED, *STOP_STATUSES)
# from the failure of one rank until the others are killed
GRACE_SECONDS = 30.0
# the same, if a whole machine is lost: the others wait for it in a collective operation and cannot save
LOST_GRACE_SECONDS = 5.0
# Exit status of a lost machine; ssh returns the same.
EXIT_LOST = 255
_POLL_SECONDS = 0.1
_KILLED = ": it was killed, usually because the memory was full; run the same command again to resume"
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


# more on a machine are a slip of the finger, and starting them would stop the machine
MAX_RANKS = 1024


def check_ranks(ranks: int) -> None:
    """Raise StreamtrainError if a machine should start too many ranks."""
    if ranks > MAX_RANKS:
        raise StreamtrainError(f"{ranks} ranks on a machine are too many; start at most {MAX_RANKS}, one per GPU")


@dataclass(frozen=True)
class Share:
    """The ranks of one machine, ``first_rank`` and the ``ranks - 1`` after it, and where all ranks meet."""

    first_rank: int
    ranks: int
    world_size: int
    address: str
    port: str


def run_ranks(arguments: Sequence[str], world_size: int) -> int:
    """Run ``main.py ARGUMENTS`` on ``world_size`` ranks of this machine and return the exit status of the run."""
    with reserved_port() as port, received_signals() as received:
        return run_share(arguments, Share(0, world_size, world_size, "127.0.0.1", str(port)), received)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a port during the ``with`` block, on which rank 0 can still listen; yields its number."""
    with socket.socket() as reserved:
        # rank 0 sets this option too, and may then bind the port that this socket holds but does not listen on
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("", 0))
        yield reserved.getsockname()[1]


def run_share(arguments: Sequence[str], share: Share, received: list[int]) -> int:
    """Run ``main.py ARGUMENTS`` on this machine's ranks; return the exit status of the first that failed, or 0.

    ``received``: signals to forward; other threads may append to it.
    """
    shared = {
        "WORLD_SIZE": share.world_size, "LOCAL_WORLD_SIZE": share.ranks, "MASTER_ADDR": share.address,
        "MASTER_PORT": share.port,
        # torchrun sets it for its own ranks, and this process may be one of them
        AGENT_STORE: False,
    }  # fmt: skip
    processes: dict[str, subprocess.Popen[bytes] | Host] = {}
    try:
        for local_rank in range(share.ranks):
            if received or any(process.poll() is not None for process in processes.values()):
                # a signal, or a rank that has ended already
                break
            rank = share.first_rank + local_rank
            variables = {**shared, "RANK": rank, "LOCAL_RANK": local_rank}
            processes[f"rank {rank}"] = subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments], stdin=subprocess.DEVNULL,
                env={**os.environ, **{name: str(value) for name, value in variables.items()}},
                # in its own session, so that Ctrl-C in the terminal arrives only once, forwarded from here
                start_new_session=True, preexec_fn=_prepare_rank,
            )  # fmt: skip
        if not processes:
            return stop_status(received)
        return wait_for_all(processes, received)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def wait_for_all(
    processes: Mapping[str, subprocess.Popen[bytes] | Host], received: list[int], of_machines: bool = False
) -> int:
    """Wait for all processes, forward each received signal, and end the others when one fails.

    Returns the exit status of the first that failed, or 0.

    Args:
        processes: by the names that messages use.
        received: signals to forward.
        of_machines: the processes are ranks of whole machines, which report the failures of their ranks themselves.
    """
    failure: int | None = None
    deadline = float("inf")
    stops: list[int] = []
    while True:
        for process in processes.values():
            process.poll()
        is_running = any(process.returncode is None for process in processes.values())
        while received:
            stops.append(received.pop(0))
            _send(processes, stops[-1])
        failed = [(process.returncode, name) for name, process in processes.items() if process.returncode]
        if failed and failure is None:
            # a killed rank, with a negative code or one above 128, causes the errors of the others
            returncode, name = min(failed, key=lambda each: (each[0] > 0 and each[0] <= 128, each))
            failure = _exit_status(returncode, stops)
            is_lost = of_machines and failure == EXIT_LOST
            deadline = time.monotonic() + (LOST_GRACE_SECONDS if is_lost else GRACE_SECONDS)
            if failure not in (EXIT_DRIFTED, *STOP_STATUSES):
                if failure not in _EXPLAINED_STATUSES and not of_machines:
                    reason = _KILLED if returncode == -signal.SIGKILL else ""
                    logger.error("%s ended with exit status %d%s", name, failure, reason)
                _send(processes, signal.SIGTERM)
        if not is_running:
            return failure or 0
        if time.monotonic() > deadline:
            _send(processes, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _send(processes: Mapping[str, subprocess.Popen[bytes] | Host], number: int) -> None:
    for process in processes.values():
        process.send_signal(number)


def stop_status(received: Sequence[int]) -> int:
    """Return the exit status of a run that signals have stopped."""
    return EXIT_INTERRUPTED if signal.SIGINT in received else EXIT_PREEMPTED


def _exit_status(returncode: int, stops: Sequence[int]) -> int:
    """Return the exit status for a ``Popen.returncode``; a rank killed by a forwarded signal counts as stopped."""
    if returncode >= 0:
        return returncode
    if -returncode in stops:
        return EXIT_INTERRUPTED if -returncode == signal.SIGINT else EXIT_PREEMPTED
    return 128 - returncode


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """Collect the stop signals that arrive during a ``with`` block instead of acting on them."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = [signal.signal(number, lambda number, frame: received.append(number)) for number in numbers]
    descriptor = signal.set_wakeup_fd(-1)  # of the thread that ends a process without ranks
    try:
        yield received
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def _prepare_rank() -> None:
    stop_with_parent()
    # main.py unblocks Ctrl-C once it can handle it without a traceback
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def stop_with_parent() -> None:
    """Let Linux send SIGTERM to this process when its parent dies, so that a run stops after a checkpoint."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
