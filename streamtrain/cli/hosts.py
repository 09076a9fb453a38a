"""``streamtrain train --hostfile``: start the ranks of several machines over ssh, with one connection to each.

The program at the other end, ``serve``, starts the ranks of its machine. It receives lines on its standard input: first
a ``Job`` as JSON, then the numbers of signals for its ranks. Environment variables are a part of the job, so passwords
do not appear in lists of processes. Each end writes to the other regularly, and takes silence for a lost connection.
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from streamtrain.cli.launch import (
    EXIT_LOST,
    GRACE_SECONDS,
    Share,
    received_signals,
    reserved_port,
    run_share,
    stop_with_parent,
    wait_for_all,
)
from streamtrain.errors import StreamtrainError
from streamtrain.run.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USAGE

# Sent to all machines; engine.environment names others.
ENVIRONMENT = (
    "AWS_*", "AZURE_*", "CC", "CUDA_HOME", "CXX", "DS_*", "FI_*", "GLOO_*", "GOOGLE_*", "HF_*", "*_proxy", "*_PROXY",
    "LD_LIBRARY_PATH", "MKL_*", "NCCL_*", "OMP_*", "PATH", "PYTHON*", "PYTORCH_*", "SSL_CERT_*", "TORCH_*", "UCX_*",
    "WANDB_*", "XDG_CACHE_HOME",
)  # fmt: skip
# a machine that is silent for so long is lost; a short failure of the network does not end a run
SILENCE_SECONDS = 48.0
# until ssh has connected, and until Python runs at the other end
CONNECT_SECONDS = 10
START_SECONDS = 60.0
_BEAT_SECONDS = 4.0
# from the signal that kills the ranks of a machine until its connection is closed
_KILL_SECONDS = 5.0
_ADVICE = "each machine needs passwordless ssh, and the same paths of Python and of this folder"
# lines on the standard output of a machine that are not of its ranks
_READY, _BEAT = b"\0ready ", b"\0alive\n"
_SLOTS = re.compile(r"(?P<name>[^\s=]+)(?:\s+slots\s*=\s*(?P<slots>\d+))?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The ranks of a machine and their arguments and variables."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    share: Share


def read_hostfile(path: Path, ranks_per_host: int | None) -> dict[str, int]:
    """Return the number of ranks for each host of a file with lines such as ``node1 slots=8``.

    Args:
        path: of the file; ``#`` starts a comment.
        ranks_per_host: replaces the numbers of the file.

    Raises:
        StreamtrainError: the file cannot be read, or a line is not as above.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise StreamtrainError(f"--hostfile {path} {reason}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _SLOTS.fullmatch(text)
        # a name that begins with a hyphen would be an option of ssh
        if match is None or text.startswith("-"):
            raise StreamtrainError(f"--hostfile {path}, line {number}: {text[:80]!r} is not such as 'node1 slots=8'")
        slots = ranks_per_host or int(match["slots"] or 0)
        if slots < 1:
            raise StreamtrainError(
                f"--hostfile {path}, line {number}: write the number of ranks, as in '{match['name']} slots=8', or "
                "give it for all hosts with --gpus N"
            )
        if match["name"] in hosts:
            raise StreamtrainError(f"--hostfile {path}, line {number}: {match['name']} is there twice")
        hosts[match["name"]] = slots
    if not hosts:
        raise StreamtrainError(f"--hostfile {path} names no host; write a line such as 'node1 slots=8' for each")
    return hosts


def run_on_hosts(arguments: Sequence[str], hosts: Mapping[str, int], variables: Sequence[str] = ()) -> int:
    """Run ``main.py ARGUMENTS`` on several machines and return the exit status of the run.

    Args:
        arguments: of each rank.
        hosts: number of ranks by the name that ssh knows; the first has rank 0.
        variables: names of environment variables to send, beside ``ENVIRONMENT``; ``*`` stands for any characters.

    Raises:
        StreamtrainError: ssh is missing, or a machine cannot be reached.
    """
    if not all(map(_is_here, hosts)) and shutil.which("ssh") is None:
        raise StreamtrainError("--hostfile needs ssh, which is not installed (Debian: apt install openssh-client)")
    address = _master_address(next(iter(hosts)), len(hosts))
    patterns = (*ENVIRONMENT, *variables)
    environment = {name: value for name, value in os.environ.items() if any(fnmatchcase(name, p) for p in patterns)}
    machines: dict[str, Host] = {}
    shown = _Shown()
    with received_signals() as received:
        try:
            for name in hosts:
                machines[name] = Host(name, shown)
            port = _wait_until_ready(list(machines.values()), received)
            if received:
                return EXIT_INTERRUPTED if signal.SIGINT in received else EXIT_PREEMPTED
            first_rank, world_size = 0, sum(hosts.values())
            for machine, ranks in zip(machines.values(), hosts.values(), strict=True):
                share = Share(first_rank, ranks, world_size, address, os.environ.get("MASTER_PORT") or str(port))
                machine.send(json.dumps(asdict(Job(arguments, environment, share))))
                first_rank += ranks
            return wait_for_all(machines, received)
        finally:
            for machine in machines.values():
                machine.kill()
                machine.wait()


def _is_here(name: str) -> bool:
    return name in ("localhost", socket.gethostname())


def _master_address(name: str, count: int) -> str:
    """Return the address at which the ranks of all machines reach the first."""
    if address := os.environ.get("MASTER_ADDR"):
        return address
    if _is_here(name):
        return socket.gethostname() if count > 1 else "127.0.0.1"
    # the name may be an alias in ~/.ssh/config
    lines = subprocess.run(["ssh", "-G", name], capture_output=True, text=True, check=False).stdout.splitlines()
    found = [line.split(None, 1)[1] for line in lines if line.startswith("hostname ")]
    return found[0] if found else name.rpartition("@")[2]


def _wait_until_ready(machines: Sequence[Host], received: Sequence[int]) -> int:
    """Wait until every machine is ready to start ranks, or a signal is received; return a free port of the first."""
    deadline = time.monotonic() + START_SECONDS
    while not received and not all(machine.port for machine in machines):
        for machine in machines:
            if not machine.port and machine.poll() is not None:
                raise StreamtrainError(f"cannot start on {machine.name}: {machine.reason()}; {_ADVICE}")
            if not machine.port and time.monotonic() > deadline:
                raise StreamtrainError(f"{machine.name} has not answered for {START_SECONDS:g} s; {_ADVICE}")
        time.sleep(0.05)
    return machines[0].port


class _Shown:
    """The output of all machines, in which an error that several of them report appears once."""

    def __init__(self) -> None:
        self._lock, self._errors = threading.Lock(), set[bytes]()

    def write(self, line: bytes, stream: IO[bytes]) -> None:
        with self._lock, suppress(OSError):
            # "[rank 1] error: " on ranks other than 0, which also name the machine of an error that is not theirs
            _, is_error, message = line.partition(b"error: ")
            if is_error:
                if any(message.endswith(seen) or seen.endswith(message) for seen in self._errors):
                    return
                self._errors.add(message)
            stream.write(line)
            stream.flush()


class Host:
    """The ranks of one machine, with the methods of ``subprocess.Popen``.

    Attributes:
        port: free on that machine; 0 until it is ready.
        returncode: the exit status of its ranks; None while they run; ``EXIT_LOST`` without a connection.
    """

    def __init__(self, name: str, shown: _Shown) -> None:
        self.name, self.port = name, 0
        self.returncode: int | None = None
        root = Path(__file__).resolve().parents[2]
        # the package need not be installed, and files in this folder must not replace modules
        program = f"import sys; sys.path[0] = {str(root)!r}; from streamtrain.cli.hosts import serve; serve()"
        words = [sys.executable, "-c", program]
        if not _is_here(name):
            remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
            words = ["ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}", name, remote]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=stop_with_parent,
        )  # fmt: skip
        self._shown, self._is_ready, self._early = shown, threading.Event(), list[bytes]()
        self._heard = self._sent = time.monotonic()
        self._killed: float | None = None
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._relay, self._relay_errors)]
        for thread in self._threads:
            thread.start()

    def _relay(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard = time.monotonic()
            if not self._is_ready.is_set():
                # a login script of the user may print something before
                _, found, number = line.partition(_READY)
                if found:
                    self.port = int(number)
                    self._is_ready.set()
                continue
            text = line.replace(_BEAT, b"")
            if text:
                self._shown.write(text, sys.stdout.buffer)

    def _relay_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if self._is_ready.is_set():
                self._shown.write(line, sys.stderr.buffer)
            else:
                self._early.append(line)

    def reason(self) -> str:
        """Return why the machine has ended before it was ready."""
        for thread in self._threads:
            thread.join(1.0)
        lines = [line.decode(errors="replace").strip() for line in self._early]
        # control characters of another machine do not belong into this terminal
        text = "".join(c for c in next(filter(None, reversed(lines)), "") if c.isprintable())
        return text[:200] or f"exit status {self._process.returncode}"

    def send(self, line: str) -> None:
        """Send a line; a lost connection is noticed by ``poll``."""
        assert self._process.stdin is not None
        self._sent = time.monotonic()
        with suppress(OSError, ValueError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def poll(self) -> int | None:
        if self.returncode is not None:
            return self.returncode
        now, status = time.monotonic(), self._process.poll()
        if status is not None:
            for thread in self._threads:
                thread.join(1.0)
            self.returncode = EXIT_LOST if status < 0 else status
            if self.returncode == EXIT_LOST and self._is_ready.is_set() and self._killed is None:
                logger.error("lost the connection to %s; run the same command again to resume", self.name)
        elif self._is_ready.is_set() and now - self._heard > SILENCE_SECONDS:
            again = "run the same command again to resume"
            logger.error("%s has not answered for %g s; %s", self.name, SILENCE_SECONDS, again)
            self._process.kill()
            self.returncode = EXIT_LOST
        elif self._killed is not None and now - self._killed > _KILL_SECONDS:
            self._process.kill()
        elif now - self._sent > _BEAT_SECONDS:
            self.send("0")
        return self.returncode

    def send_signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            if self._killed is not None:
                return
            self._killed = time.monotonic()
        self.send(str(int(number)))

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.wait()


def serve() -> None:
    """Run the ranks of this machine for ``run_on_hosts``, which writes to the standard input; ends the process."""
    sys.stdout.buffer.write(_READY)
    with reserved_port() as port, received_signals() as received:
        sys.stdout.buffer.write(b"%d\n" % port)
        sys.stdout.buffer.flush()
        lines = _Lines(sys.stdin.fileno())
        first = lines.read(None)
        if first is None:
            os._exit(EXIT_USAGE)
        job = json.loads(first)
        os.environ.update(job["environment"])
        for target in (_receive, _beat):
            threading.Thread(target=target, args=(lines, received), daemon=True).start()
        status = run_share(job["arguments"], Share(**job["share"]), received)
    sys.stderr.flush()
    # not sys.exit: a thread waits for input
    os._exit(status)


class _Lines:
    """Lines that arrive at a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._data = descriptor, b""

    def read(self, seconds: float | None) -> str | None:
        """Return the next line; None at the end, or if nothing arrives for ``seconds``."""
        while b"\n" not in self._data:
            if not select.select([self._descriptor], [], [], seconds)[0]:
                return None
            chunk = os.read(self._descriptor, 65536)
            if not chunk:
                return None
            self._data += chunk
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()


def _receive(lines: _Lines, received: list[int]) -> None:
    """Append the signals that arrive; without a connection, stop the ranks after a checkpoint, or kill them."""
    while (line := lines.read(SILENCE_SECONDS)) is not None:
        if number := int(line):
            received.append(number)
    received.append(signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    received.append(signal.SIGKILL)


def _beat(lines: _Lines, received: list[int]) -> None:
    """Show the other end that this one is alive."""
    with suppress(OSError):
        while True:
            os.write(1, _BEAT)
            time.sleep(_BEAT_SECONDS)
