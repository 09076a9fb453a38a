"""How much memory this host still has for us."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """What processes may take without swapping or being killed, within the limits of a container; 0 if unknown."""
    limits = [limit for limit in (_of_machine(), _of_group()) if limit is not None]
    return max(0, min(limits, default=0))


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _of_group() -> int | None:
    """What the container's limit leaves; None where there is none, or it cannot be read."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # the cache of files is given up when memory is wanted
        return limit - used + int(statistics["inactive_file"])
    except (OSError, KeyError, ValueError):
        return None
