"""Start the ranks of a training run and forward stop signals to them.

The launchers of PyTorch and DeepSpeed kill the ranks 30 s after a signal and exit with status 1. But a stop takes one
step and one checkpoint, and schedulers need the run's own exit status (75 or 130), so this module starts the ranks of
one machine itself. Several machines need DeepSpeed's launcher.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from streamtrain.engine.rendezvous import AGENT_STORE
from streamtrain.run.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USAGE, STOP_STATUSES

SCRIPT = Path(__file__).resolve().parents[1] / "main.py"
# the ranks have already reported the reason
_EXPLAINED_STATUSES = (EXIT_USAGE, *STOP_STATUSES)
# from the failure of one rank until the others are killed
GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.1
_KILLED = ": it was killed, usually because the memory was full; run the same command again to resume"
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


def run_ranks(arguments: Sequence[str], world_size: int) -> int:
    """Run ``main.py ARGUMENTS`` on ``world_size`` ranks of this machine and return the exit status of the run."""
    with reserved_port() as port:
        shared = {
            "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            # torchrun sets it for its own ranks, and this process may be one of them
            AGENT_STORE: False,
        }  # fmt: skip
        environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world_size)]
        return _run([sys.executable, str(SCRIPT), *arguments], environments, _prepare_rank)


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a port during the ``with`` block, on which rank 0 can still listen; yields its number."""
    with socket.socket() as reserved:
        # rank 0 sets this option too, and may then bind the port that this socket holds but does not listen on
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("", 0))
        yield reserved.getsockname()[1]


def run_on_hosts(arguments: Sequence[str], hostfile: Path, ranks_per_host: int | None) -> int:
    """Run ``main.py ARGUMENTS`` on the hosts of ``hostfile`` through DeepSpeed's launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error"]
    launcher += ["--hostfile", str(hostfile)]
    if ranks_per_host is not None:
        launcher += ["--num_gpus", str(ranks_per_host)]
    with reserved_port() as free:
        # a fixed port, such as DeepSpeed's default, fails for the second run on a host
        launcher += ["--master_port", os.environ.get("MASTER_PORT") or str(free)]
        return _run([*launcher, str(SCRIPT), *arguments], [{}], stop_with_parent)


def _run(command: Sequence[str], environments: Sequence[dict[str, object]], prepare: Callable[[], None]) -> int:
    """Run ``command`` once for each set of variables, and return the exit status of the first process that failed."""
    processes: list[subprocess.Popen[bytes]] = []
    with _received_signals() as received:
        try:
            for variables in environments:
                environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
                processes.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL,
                        # in its own session, so that Ctrl-C in the terminal arrives only once, forwarded from here
                        start_new_session=True, preexec_fn=prepare,
                    )
                )  # fmt: skip
            return _wait(processes, received)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Wait for all processes, forward each received signal, and end the others when one fails."""
    failure: int | None = None
    deadline = float("inf")
    stops: list[int] = []
    while True:
        for process in processes:
            process.poll()
        is_running = any(process.returncode is None for process in processes)
        while received:
            stops.append(received.pop(0))
            _send(processes, stops[-1])
        failed = [(process.returncode, rank) for rank, process in enumerate(processes) if process.returncode]
        if failed and failure is None:
            # a killed rank, with a negative code, causes the errors of the others
            returncode, rank = min(failed)
            failure = _exit_status(returncode, stops)
            deadline = time.monotonic() + GRACE_SECONDS
            if failure not in STOP_STATUSES:
                if failure not in _EXPLAINED_STATUSES:
                    reason = _KILLED if returncode == -signal.SIGKILL else ""
                    logger.error("rank %d ended with exit status %d%s", rank, failure, reason)
                _send(processes, signal.SIGTERM)
        if not is_running:
            return failure or 0
        if time.monotonic() > deadline:
            _send(processes, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def _exit_status(returncode: int, stops: Sequence[int]) -> int:
    """Return the exit status for a ``Popen.returncode``; a rank killed by a forwarded signal counts as stopped."""
    if returncode >= 0:
        return returncode
    if -returncode in stops:
        return EXIT_INTERRUPTED if -returncode == signal.SIGINT else EXIT_PREEMPTED
    return 128 - returncode


@contextmanager
def _received_signals() -> Iterator[list[int]]:
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
