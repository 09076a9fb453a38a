"""Memory of this process and speed of the steps, as metrics by tag."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# percentiles of the step time, over the most recent steps
RECENT, PERCENTILES = 200, (50, 90, 99)


def rss_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # other systems report the peak only
    return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Return the highest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss also counts the process that started this one
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank: of its GPU if it has one, else of the process.

    On a GPU it includes the plan's allowances: unused parts of torch's memory, and the memory of contexts and
    libraries, such as DALI, at the time of the call. Other programs on the same GPU count too.
    """
    if device.type != "cuda":
        return peak_rss_bytes()
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_reserved(device) + max(0, outside)


def memory_scalars(device: torch.device) -> dict[str, float]:
    """Return the current and peak resident bytes, and on a GPU its peak, under ``memory/``."""
    scalars = {"memory/rss_bytes": float(rss_bytes()), "memory/peak_rss_bytes": float(peak_rss_bytes())}
    if device.type == "cuda":
        scalars["memory/gpu_bytes"] = float(peak_bytes(device))
    return scalars


@dataclass(frozen=True)
class Work:
    """The work of one step over all ranks."""

    images: int
    # of the student's crops
    tokens: int
    # required by the method: recomputation is not counted
    model_flops: float


class StepClock:
    """Times steps from one ``tick`` to the next, including the work between steps."""

    def __init__(self, peak_flops: float | None = None) -> None:
        """``peak_flops``: FLOP/s of all devices; None if unknown."""
        self._last = time.perf_counter()
        self._waited = 0.0
        self._peak_flops = peak_flops
        self._recent: deque[float] = deque(maxlen=RECENT)

    def restart(self) -> None:
        """Let the first step begin now."""
        self._last = time.perf_counter()

    def tick(self, work: Work, wait_seconds: float) -> dict[str, float]:
        """Return the metrics of the step that ends now; ``wait_seconds``: the loader's total waiting time."""
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
    """Measures the share of time spent inside its ``with`` blocks."""

    def __init__(self) -> None:
        self._created = self._entered = time.perf_counter()
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._entered

    @property
    def share(self) -> float:
        """Share of the time since creation, in 0..1."""
        return self._seconds / max(time.perf_counter() - self._created, 1e-9)
