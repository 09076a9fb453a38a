"""What a measured stretch of work cost: CPU time of the process tree, wall time, peak memory."""

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


def in_fresh_process(work: Callable[..., Result], *arguments: object) -> Result:
    """``work(*arguments)`` in a process of its own, so that neither memory nor caches of another run count.

    Raises:
        StreamtrainError: with the message of any ``ValueError`` over there.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work_or_message, work, *arguments).result()


def work_or_message(work: Callable[..., Result], *arguments: object) -> Result:
    """``work(*arguments)``, where an error can travel to another process."""
    try:
        return work(*arguments)
    except ValueError as error:
        # plain text, since not every error survives the way between processes
        raise StreamtrainError(str(error)) from None


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and all children that have ended."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def age_seconds() -> float:
    """Since this process began, to a hundredth (Linux only)."""
    # the fields after the name, which may hold anything
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def settle(quiet_seconds: float = 0.3) -> float:
    """Wait until background threads have gone idle; returns the time (``perf_counter``) of their last work."""
    last_cpu, last_work = cpu_seconds(), time.perf_counter()
    while time.perf_counter() - last_work < quiet_seconds:
        time.sleep(0.02)
        now = cpu_seconds()
        # the watching itself costs a little
        if now - last_cpu > 0.004:
            last_work = time.perf_counter()
        last_cpu = now
    return last_work


def rss_bytes() -> int:
    """What is resident now (Linux only)."""
    return _status("VmRSS")


def reset_peak_rss() -> int:
    """Forget the peak so far; returns the bytes that are resident now (Linux only)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return rss_bytes()


def peak_rss_since(stood: int) -> int:
    """The most bytes resident since ``reset_peak_rss``, above the ``stood`` that it returned."""
    return _status("VmHWM") - stood


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {key}")
