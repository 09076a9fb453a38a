"""Memory of this process and speed of the step, under the tags they are logged by."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

import torch


def rss_bytes() -> int:
    """Resident memory of this process now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_rss_bytes()  # not Linux: the peak is what can be had


def peak_rss_bytes() -> int:
    """The most resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(device: torch.device) -> int:
    """The most that this rank has held: on a CUDA device its allocator, else the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def memory_scalars(device: torch.device) -> dict[str, float]:
    """Bytes under ``memory/``: resident now and at most, and on CUDA the most its allocator has held."""
    scalars = {"memory/rss_bytes": float(rss_bytes()), "memory/peak_rss_bytes": float(peak_rss_bytes())}
    if device.type == "cuda":
        scalars["memory/gpu_bytes"] = float(torch.cuda.max_memory_allocated(device))
    return scalars


class StepClock:
    """Times whole steps, from one ``tick`` to the next, so that nothing between them goes uncounted."""

    def __init__(self, wait_seconds: float = 0.0) -> None:
        self._last = time.perf_counter()
        self._waited = wait_seconds

    def tick(self, images: int, wait_seconds: float) -> dict[str, float]:
        """Scalars of the step that ends now.

        Args:
            images: images the step consumed, over all ranks.
            wait_seconds: the loader's running total of time spent waiting for data.
        """
        now = time.perf_counter()
        seconds, waited = now - self._last, wait_seconds - self._waited
        self._last, self._waited = now, wait_seconds
        return {
            "speed/images_per_second": images / seconds,
            "speed/step_seconds": seconds,
            "data/wait_share": min(waited / seconds, 1.0),
        }
