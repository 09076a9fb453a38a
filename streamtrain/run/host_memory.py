"""The memory of this host or container."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Return the memory that processes of this host or container can still allocate; None if unknown."""
    limits = [limit for limit in (_machine_limit(), _container_limit()) if limit is not None]
    return max(0, min(limits)) if limits else None


def _machine_limit() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _container_limit() -> int | None:
    """Return the available memory within the container's limit; None without a readable limit."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # the kernel frees inactive file cache on demand
        return limit - used + int(statistics["inactive_file"])
    except (OSError, KeyError, ValueError):
        return None
