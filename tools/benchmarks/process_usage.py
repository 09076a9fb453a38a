"""CPU time, wall time and memory of this process, and running work in a fresh one."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from streamtrain.errors import StreamtrainError

Result = TypeVar("Result")
# idle time after which background threads count as idle
QUIET_SECONDS = 0.3


def run_in_fresh_process(work: Callable[..., Result], *arguments: object) -> Result:
    """Return ``work(*arguments)``, run in a new process so that memory and caches of earlier work do not count.

    Raises:
        StreamtrainError: with the message of a ``ValueError`` in that process.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call_with_portable_errors, work, *arguments).result()


def call_with_portable_errors(work: Callable[..., Result], *arguments: object) -> Result:
    """Return ``work(*arguments)``; a ``ValueError`` becomes an error that can be pickled."""
    try:
        return work(*arguments)
    except ValueError as error:
        raise StreamtrainError(str(error)) from None


def cpu_seconds() -> float:
    """Return the CPU time of this process, its threads, and its finished children."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_rss_bytes() -> int:
    """Return the highest resident memory of this process alone (Linux only)."""
    return _read_status("VmHWM")


def process_age_seconds() -> float:
    """Return the time since this process started, to 0.01 s (Linux only)."""
    # the process name ends at the last parenthesis and may contain anything
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def wait_until_idle() -> float:
    """Wait until background threads are idle; return the time (``perf_counter``) of their last work."""
    last_cpu, last_work = cpu_seconds(), time.perf_counter()
    while time.perf_counter() - last_work < QUIET_SECONDS:
        time.sleep(0.02)
        now = cpu_seconds()
        # this loop itself uses a little CPU time
        if now - last_cpu > 0.004:
            last_work = time.perf_counter()
        last_cpu = now
    return last_work


def rss_bytes() -> int:
    """Return the current resident memory of this process (Linux only)."""
    return _read_status("VmRSS")


def reset_peak_rss() -> int:
    """Reset the peak of resident memory; return the current resident bytes (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return rss_bytes()


def peak_rss_since(baseline: int) -> int:
    """Return the peak since ``reset_peak_rss`` minus ``baseline``, the bytes that it returned."""
    return _read_status("VmHWM") - baseline


def _read_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
