"""The variables that a launcher sets, and the address at which the ranks connect.

Torch-free, so that errors are reported within a second.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

from streamtrain.errors import ConfigError
from streamtrain.run.machine import available_cores

RESOLVE_SECONDS = 10.0
# whether torchrun, and not rank 0, serves the port
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
MEETING_ADVICE = (
    "check that all ranks are started with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE and can reach that port, "
    "or raise engine.collective_timeout_seconds"
)


class AddressError(ConfigError):
    """The address of rank 0 cannot be used, so the ranks cannot tell each other."""


class MeetingError(ConfigError):
    """The ranks could not meet; another start may succeed."""


@dataclass(frozen=True)
class Launch:
    """The rank of this process, as set by ``deepspeed``, ``torchrun``, ``srun`` with variables, or no launcher."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, and set missing ones for DeepSpeed.

        Without them, or with a world size of 1, this is the only rank.

        Raises:
            ConfigError: a variable is missing, is not a number, or contradicts another one.
        """
        world_size = _read_number("WORLD_SIZE", 1)
        if world_size > 1:
            _require_variables(world_size)
        rank, local_rank = _read_number("RANK", 0), _read_number("LOCAL_RANK", 0)
        # DeepSpeed's launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
        name = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
        local_world_size = _read_number(name, world_size)
        for label, number, count_label, count in (
            ("RANK", rank, "WORLD_SIZE", world_size),
            ("LOCAL_RANK", local_rank, name if os.environ.get(name) else "WORLD_SIZE", local_world_size),
        ):
            if number >= count:
                raise ConfigError(
                    f"{label} is {number}, but {count_label} is "
                    f"{count if os.environ.get(count_label) else 'not set'}; ranks count from 0; set both as a "
                    "launcher would, or unset RANK, LOCAL_RANK and WORLD_SIZE to train in one process"
                )
        if local_world_size > world_size:
            raise ConfigError(f"{name} is {local_world_size}, more than WORLD_SIZE, which is {world_size}; correct one")
        if world_size == 1 and os.environ.get(AGENT_STORE) != "True":
            # a single rank takes any free port and ignores a launcher's address
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
        numbers = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        return cls(rank, world_size, local_rank, local_world_size)

    @property
    def spans_machines(self) -> bool:
        return self.world_size > self.local_world_size

    @property
    def cores(self) -> int:
        """Number of CPU cores for this rank."""
        return self.shared_cores if self.has_own_cores else max(1, self.shared_cores // self.local_world_size)

    @property
    def shared_cores(self) -> int:
        """Number of CPU cores that this process may use, with the machine's other ranks unless they have their own."""
        return min(available_cores(), _slurm_cores() or sys.maxsize)

    @property
    def has_own_cores(self) -> bool:
        """Whether Slurm has bound each rank to cores of its own; otherwise the ranks of a machine share its cores.

        ``torchrun`` in a Slurm task starts ranks that share the task's cores.
        """
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        is_task = [os.environ.get(name) for name in names] == [
            str(number) for number in (self.rank, self.local_rank, self.world_size)
        ]
        return is_task and available_cores() < (_slurm_cores() or 0)


def _slurm_cores() -> int | None:
    """Return the number of CPU cores of this machine that belong to the Slurm job; None outside of a job."""
    text = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return max(1, int(text)) if text.isascii() and text.isdecimal() else None


def _read_number(name: str, default: int) -> int:
    """Return a variable of the launcher; an empty one counts as not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    minimum = 1 if name.endswith("SIZE") else 0
    # at most 6 digits, which is a million ranks
    if not (text.isascii() and text.isdecimal() and len(text) <= 6) or int(text) < minimum:
        raise ConfigError(f"{name} is {text!r}, which is not a whole number of at least {minimum}; correct or unset it")
    return int(text)


def _require_variables(world_size: int) -> None:
    """Raise ConfigError unless the launcher of several ranks has set every variable."""
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name, "").strip()]
    if missing:
        hint = "; with one process per machine, LOCAL_RANK=0 and LOCAL_WORLD_SIZE=1" if "LOCAL_RANK" in missing else ""
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; "
            f"start the ranks with streamtrain train, deepspeed or torchrun, or set the missing variables{hint}"
        )


def check_master(launch: Launch, wait_seconds: float = RESOLVE_SECONDS) -> None:
    """Check that the address of rank 0 can be resolved and, on rank 0, that its port is free.

    Raises:
        AddressError: the host is unknown, or the port is invalid or in use.
    """
    address, text = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:6]) < 2**16):
        raise AddressError(f"MASTER_PORT is {text!r}, which is not a port from 1 to 65535; correct it")
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            socket.getaddrinfo(address, int(text))
            break
        except (OSError, UnicodeError) as error:
            # the name of a host that is starting may take a moment to appear
            if time.monotonic() > deadline:
                reason = getattr(error, "strerror", None) or "not a host name"
                raise AddressError(
                    f"MASTER_ADDR {address!r} is not a known host ({reason}); set it to the name or the IP address of "
                    "rank 0's machine, or to 127.0.0.1 if all ranks are on one machine"
                ) from None
            time.sleep(0.5)
    if launch.rank == 0 and os.environ.get(AGENT_STORE) != "True" and not _is_free(int(text)):
        raise AddressError(_port_message(text))


def wait_for_rank_0(launch: Launch, timeout: timedelta) -> str:
    """Wait until rank 0 listens on its port, and return its IP address.

    torch also waits, but prints pages for each failed attempt.

    Raises:
        MeetingError: rank 0 does not listen within ``timeout``.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            with socket.create_connection(address, 10.0) as connection:
                return str(connection.getpeername()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise meeting_error(error, launch, timeout) from None
        time.sleep(0.1)


def _is_free(port: int) -> bool:
    """Return whether this process could listen on a port, as torch does: on all addresses of the machine."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            return error.errno not in (errno.EADDRINUSE, errno.EACCES)
    return True


def _port_message(port: str) -> str:
    return (
        f"port {port}, on which the ranks of the run meet, is in use by another program, such as another run; choose "
        "another one with --master_port N (deepspeed), --master-port N (torchrun) or MASTER_PORT=N, or unset "
        "MASTER_PORT and start the ranks with streamtrain train, which finds a free port"
    )


def lost_rank_message(error: RuntimeError, rank: int) -> str | None:
    """Return a one-line message for a collective operation that failed, usually with a rank; None: another error."""
    # an error of a collective operation has loaded torch
    distributed = sys.modules.get("torch.distributed")
    is_known = distributed is not None and isinstance(error, getattr(distributed, "DistError", ()))
    text = " ".join(str(error).split())
    if not is_known and not (text.startswith("[") and "/gloo/" in text):
        return None
    # after the place in the source of gloo or NCCL; advice and the C++ stack follow
    reason = text.partition("] ")[2] if text.startswith("[") else text
    cause = text.partition("Last error:")[2].strip()[:150]
    reason = cause or reason.partition(". ")[0].partition(" Exception raised from")[0][:150].rstrip(".")
    return (
        f"rank {rank}: a collective operation failed ({reason}), usually because another rank has ended or is stuck; "
        "run the same command again"
    )


def meeting_error(error: Exception, launch: Launch, timeout: timedelta) -> MeetingError:
    """Return the error of ranks that could not form a process group, in one line."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return MeetingError(_port_message(port))
    # torch appends the C++ stack
    reason = text.partition(" Exception raised from")[0][:300]
    return MeetingError(
        f"rank {launch.rank} of {launch.world_size} could not meet the others at {address}:{port} (limit "
        f"{timeout.total_seconds():g} s: {reason}); {MEETING_ADVICE}"
    )
