"""CPU cores and memory of this machine, within the limits of its control groups, disk space, GPU driver. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# present where a driver is installed: NVIDIA, AMD, Windows Subsystem for Linux, NVIDIA on a board
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu")
# names of the limit, the current use and the inactive file cache, in the control groups of version 2 and 1
_FILES = {2: ("memory.max", "memory.current", "inactive_file"),
          1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip


class Space(NamedTuple):
    """Bytes of a memory or a disk: all of it, and the part that is free."""

    total: int
    free: int


def has_gpu_driver() -> bool:
    """Return whether this machine may have a GPU; without a driver it has none, and torch is not needed to see that."""
    return any(os.path.exists(device) for device in _GPU_DEVICES)


def host_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> Space | None:
    """Return the memory of this process's machine or container, the smaller of the two; None if unknown."""
    try:
        lines = (line.split() for line in (proc / "meminfo").read_text(encoding="ascii").splitlines())
        numbers = {words[0]: 1024 * int(words[1]) for words in lines if len(words) > 1}
        spaces = [Space(numbers["MemTotal:"], numbers["MemAvailable:"])]
    except (OSError, KeyError, ValueError):
        return None
    for version, group in _control_groups("memory", proc, cgroup):
        limit_name, use_name, cache_name = _FILES[version]
        try:
            limit, use = (int((group / name).read_text()) for name in (limit_name, use_name))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # the kernel frees inactive file cache on demand
            spaces.append(Space(limit, limit - use + int(statistics[cache_name])))
        except (OSError, KeyError, ValueError):
            continue  # no limit ("max"), or the root group, which has no such files
    return Space(min(space.total for space in spaces), max(0, min(space.free for space in spaces)))


def available_cores(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Return the number of CPU cores that this process may use: by its affinity and its control groups' quotas."""
    cores = len(os.sched_getaffinity(0))
    for version, group in _control_groups("cpu", proc, cgroup):
        try:
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            # more threads than this would use up the quota early in each period, and then wait
            cores = min(cores, int(quota) // int(period)) if int(quota) > 0 else cores
        except (OSError, ValueError, ZeroDivisionError):
            continue  # no limit ("max"), or the root group
    return max(1, cores)


def _control_groups(controller: str, proc: Path, cgroup: Path) -> Iterator[tuple[int, Path]]:
    """Yield the version and the folder of each control group that may limit this process."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = {1: "/", 2: "/"}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            paths[1 if controllers else 2] = path
    for version, root in ((2, cgroup), (1, cgroup / controller)):
        # the path may be a path of the host, and a container sees only the last folder of it, as the root
        folder = root / paths[version].strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            yield version, group


def disk_space(folder: Path) -> Space | None:
    """Return the space of the disk of a folder, or of its closest parent that exists; None if unknown."""
    for parent in (folder.absolute(), *folder.absolute().parents):
        try:
            status = os.statvfs(parent)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        # some network file systems report nothing
        return Space(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize) if status.f_blocks else None
    return None


def folder_bytes(folder: Path) -> int:
    """Return the sizes of all files below a folder; 0 if it does not exist."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
