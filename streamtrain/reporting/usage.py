"""Memory of this process and speed of the step, under the tags they are logged by."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# steps that the percentiles are of, and these
RECENT, PERCENTILES = 200, (50, 90, 99)


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


@dataclass(frozen=True)
class Work:
    """What a step has done, over all ranks."""

    images: int
    # that the student has seen
    tokens: int
    # of the method, nothing counted twice
    model_flops: float


class StepClock:
    """Times whole steps, from one ``tick`` to the next, so that nothing between them goes uncounted."""

    def __init__(self, peak_flops: float | None = None) -> None:
        """``peak_flops``: what all devices together can do a second at most; None where nobody knows."""
        self._last = time.perf_counter()
        self._waited = 0.0
        self._peak_flops = peak_flops
        self._recent: deque[float] = deque(maxlen=RECENT)

    def tick(self, work: Work, wait_seconds: float) -> dict[str, float]:
        """Scalars of the step that ends now.

        Args:
            work: of the step.
            wait_seconds: the loader's running total of time spent waiting for data.
        """
        now = time.perf_counter()
        seconds, waited = now - self._last, wait_seconds - self._waited
        self._last, self._waited = now, wait_seconds
        self._recent.append(seconds)
        scalars = {
            "speed/images_per_second": work.images / seconds,
            "speed/tokens_per_second": work.tokens / seconds,
            "speed/model_flops_per_second": work.model_flops / seconds,
            "speed/step_seconds": seconds,
            "data/wait_share": min(waited / seconds, 1.0),
        }
        for share in PERCENTILES:
            scalars[f"speed/step_seconds_p{share}"] = float(np.percentile(self._recent, share))
        if self._peak_flops is not None:
            scalars["speed/mfu"] = work.model_flops / seconds / self._peak_flops
        return scalars


class Stopwatch:
    """The share of the time since it was made that was spent within its ``with`` blocks."""

    def __init__(self) -> None:
        self._made = self._entered = time.perf_counter()
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._entered

    @property
    def share(self) -> float:
        """In 0..1."""
        return self._seconds / max(time.perf_counter() - self._made, 1e-9)
