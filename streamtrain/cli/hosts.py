"""``streamtrain train --hostfile``: start the ranks of several machines over ssh, with one connection to each.

The program at the other end, ``serve``, starts the ranks of its machine. It receives lines on its standard input: first
a ``Job`` as JSON, then the numbers of signals for its ranks. Environment variables are a part of the job, so passwords
do not appear in lists of processes. ssh notices that a machine is lost; the other end, that it hears nothing more.
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
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from streamtrain.cli.launch import (
    EXIT_LOST,
    GRACE_SECONDS,
    Share,
    check_ranks,
    received_signals,
    reserved_port,
    run_share,
    stop_status,
    stop_with_parent,
    wait_for_all,
)
from streamtrain.errors import StreamtrainError
from streamtrain.run.logs import configure_logging
from streamtrain.run.signals import EXIT_FAILED

# Sent to all machines; engine.environment names others.
ENVIRONMENT = (
    "AWS_*", "AZURE_*", "CC", "CUDA_*", "CXX", "DS_*", "FI_*", "GLOO_*", "GOOGLE_*", "HF_*", "*_proxy", "*_PROXY",
    "LD_LIBRARY_PATH", "MKL_*", "NCCL_*", "NETRC", "OMP_*", "PATH", "PYTHON*", "PYTORCH_*", "SSL_CERT_*", "TORCH*",
    "TRITON_*", "UCX_*", "WANDB_*", "XDG_CACHE_HOME",
)  # fmt: skip
# numbers of GPUs, which may differ between machines
_OF_ONE_MACHINE = ("CUDA_VISIBLE_DEVICES",)
# A machine that sends nothing for this long is lost; shorter failures of the network do not end a run.
SILENCE_SECONDS = 40.0
# ssh asks this often whether the other end is there
_ALIVE_SECONDS = 10
# until ssh has connected, and until Python runs at the other end
CONNECT_SECONDS = 10
START_SECONDS = 60.0
_BEAT_SECONDS = 4.0
# from SIGKILL to the ranks of a machine until its ssh is killed
_KILL_SECONDS = 5.0
_ADVICE = "each machine needs passwordless ssh, and the same paths of Python and of this folder"
# a machine writes this line before its ranks write any
_READY = b"\0ready "
_ERROR = re.compile(rb"(?:\[rank \d+\] )?error: (?P<message>.*)", re.DOTALL)
# the same error of other machines in this time is not shown again
_REPEATED_SECONDS = 5.0
# a name or an address, with a user if needed
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.:@%/\[\]-]*)(?:\s+slots\s*=\s*(?P<slots>[0-9]{1,9}))?")

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
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise StreamtrainError(f"--hostfile {path} {reason}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise StreamtrainError(f"--hostfile {path}, line {number}: expected 'NAME slots=N', got {text[:80]!r}")
        slots = ranks_per_host or int(match["slots"] or 0)
        if slots < 1:
            raise StreamtrainError(
                f"--hostfile {path}, line {number}: write the number of ranks, as in '{match['name']} slots=8', or "
                "give it for all hosts with --gpus N"
            )
        check_ranks(slots)
        if match["name"] in hosts:
            raise StreamtrainError(f"--hostfile {path}, line {number}: {match['name']} is listed twice; keep one line")
        hosts[match["name"]] = slots
    if not hosts:
        raise StreamtrainError(f"--hostfile {path} lists no host; write a line such as 'node1 slots=8' for each")
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
    names = {name for name in os.environ if _matches(name, ENVIRONMENT) and name not in _OF_ONE_MACHINE}
    names |= {name for name in os.environ if _matches(name, variables)}
    environment = {name: os.environ[name] for name in names}
    machines: dict[str, Host] = {}
    shown = _Shown()
    with received_signals() as received:
        try:
            for name in hosts:
                machines[name] = Host(name, shown)
            port = _wait_until_ready(list(machines.values()), received)
            _check_names(machines.values())
            if received:
                logger.info("stopped before the start")
                return stop_status(received)
            first_rank, world_size = 0, sum(hosts.values())
            for machine, ranks in zip(machines.values(), hosts.values(), strict=True):
                share = Share(first_rank, ranks, world_size, address, os.environ.get("MASTER_PORT") or str(port))
                machine.send(json.dumps(asdict(Job(arguments, environment, share))))
                first_rank += ranks
            status = wait_for_all(machines, received, of_machines=True)
            return EXIT_FAILED if status == EXIT_LOST else status
        finally:
            for machine in machines.values():
                machine.kill()
                machine.wait()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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
    address = found[0] if found else name.rpartition("@")[2]
    if count > 1 and (address == "::1" or address.startswith("127.")):
        raise StreamtrainError(
            f"other machines cannot reach {address}; write the name of the first machine in the host file, or set "
            "MASTER_ADDR"
        )
    return address


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


def _check_names(machines: Collection[Host]) -> None:
    """Raise StreamtrainError if two lines of the host file are the same machine."""
    names: dict[str, str] = {}
    for machine in machines:
        other = names.setdefault(machine.identity, machine.name)
        if machine.identity and other != machine.name:
            raise StreamtrainError(f"{other} and {machine.name} are the same machine; keep one line of the host file")


class _Shown:
    """The output of all machines, in which an error that several of them report at the same time appears once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # errors, with the time and the machine of each
        self._errors: dict[bytes, tuple[float, str]] = {}

    def write(self, line: bytes, stream: IO[bytes], machine: str) -> None:
        with self._lock, suppress(OSError):
            if (match := _ERROR.match(line.rstrip())) and self._is_repeated(match["message"], machine):
                return
            stream.write(line)
            stream.flush()

    def _is_repeated(self, message: bytes, machine: str) -> bool:
        now = time.monotonic()
        self._errors = {each: seen for each, seen in self._errors.items() if now - seen[0] < _REPEATED_SECONDS}
        for other, (_, where) in self._errors.items():
            short, long = sorted((message, other), key=len)
            # other machines name the one with the error first
            if where != machine and short and (short == long or long.endswith(b": " + short)):
                return True
        self._errors[message] = now, machine
        return False


class Host:
    """The ranks of one machine, with the methods of ``subprocess.Popen``.

    Attributes:
        port: free on that machine; 0 until it is ready.
        identity: its own name and the id of its last boot, since machines made from one image have the same name; empty
            until it is ready.
        returncode: the exit status of its ranks; None while they run; ``EXIT_LOST`` without a connection.
    """

    def __init__(self, name: str, shown: _Shown) -> None:
        self.name, self.identity, self.port = name, "", 0
        self.returncode: int | None = None
        root = Path(__file__).resolve().parents[2]
        # the package need not be installed, and files in this folder must not replace modules
        program = f"import sys; sys.path[0] = {str(root)!r}; from streamtrain.cli.hosts import serve; serve()"
        words = [sys.executable, "-c", program]
        if not _is_here(name):
            remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"
            options = {
                "BatchMode": "yes", "ConnectTimeout": CONNECT_SECONDS, "ServerAliveInterval": _ALIVE_SECONDS,
                "ServerAliveCountMax": round(SILENCE_SECONDS / _ALIVE_SECONDS) - 1,
                # a shared connection has other limits
                "ControlPath": "none",
            }  # fmt: skip
            words = ["ssh", "-T", *(f"-o{key}={value}" for key, value in options.items()), name, remote]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=stop_with_parent,
        )  # fmt: skip
        self._shown, self._is_ready, self._early = shown, threading.Event(), deque[bytes](maxlen=20)
        # when the last line was sent, after the job
        self._sent: float | None = None
        self._killed: float | None = None
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._relay, self._relay_errors)]
        for thread in self._threads:
            thread.start()

    def _relay(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if self._is_ready.is_set():
                self._shown.write(line, sys.stdout.buffer, self.name)
                continue
            # a login script of the user may print something before
            _, found, words = line.partition(_READY)
            if found:
                number, _, self.identity = words.decode().strip().partition(" ")
                self.port = int(number)
                self._is_ready.set()

    def _relay_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if self._is_ready.is_set():
                self._shown.write(line, sys.stderr.buffer, self.name)
            else:
                self._early.append(line)

    def reason(self) -> str:
        """Return why the machine has ended before it was ready."""
        for thread in self._threads:
            thread.join(1.0)
        lines = [line.decode(errors="replace").strip() for line in self._early]
        return next(filter(None, reversed(lines)), "")[:200] or f"exit status {self._process.returncode}"

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
        elif self._killed is not None and now - self._killed > _KILL_SECONDS:
            self._process.kill()
        elif self._sent is not None and now - self._sent > _BEAT_SECONDS:
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
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError, AttributeError):
                stream.close()  # type: ignore[union-attr]


def _identity() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def serve() -> None:
    """Run the ranks of this machine for ``run_on_hosts``, which writes to the standard input; ends the process."""
    configure_logging()
    sys.stdout.buffer.write(_READY)
    with reserved_port() as port, received_signals() as received:
        sys.stdout.buffer.write(f"{port} {_identity()}\n".encode())
        sys.stdout.buffer.flush()
        lines = _Lines(sys.stdin.fileno())
        # until all others are ready, or the connection is lost
        first = lines.read(START_SECONDS + SILENCE_SECONDS)
        if first is None:
            os._exit(EXIT_FAILED)
        job = json.loads(first)
        os.environ.update(job["environment"])
        threading.Thread(target=_receive, args=(lines, received), daemon=True).start()
        status = run_share(job["arguments"], Share(**job["share"]), received)
    sys.stderr.flush()
    # not sys.exit: a thread waits for input
    os._exit(status)


class _Lines:
    """Lines that arrive at a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._data = descriptor, b""

    def read(self, seconds: float) -> str | None:
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
    """Forward the signals that arrive. Without a connection, stop the ranks, and kill them ``GRACE_SECONDS`` later."""
    while (line := lines.read(SILENCE_SECONDS)) is not None:
        if number := int(line):
            received.append(number)
    received.append(signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    received.append(signal.SIGKILL)
