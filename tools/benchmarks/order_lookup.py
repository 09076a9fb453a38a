"""Time and memory for a rank to find its first sample in the middle of an epoch of any size."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.process_usage import peak_rss_bytes, run_in_fresh_process
from shards.reading.order import Order


def run(
    num_samples: int, shard_samples: int, world_size: int, at: float, micro_batch: int, window: int, lanes: int
) -> dict[str, Any]:
    """Measure in a fresh process, as at the start of a run."""
    return run_in_fresh_process(_measure, num_samples, shard_samples, world_size, at, micro_batch, window, lanes)


def _measure(
    num_samples: int, shard_samples: int, world_size: int, at: float, micro_batch: int, window: int, lanes: int
) -> dict[str, Any]:
    whole, rest = divmod(num_samples, shard_samples)
    sizes = np.array([shard_samples] * whole + [rest] * (rest > 0), dtype=np.int64)
    global_batch = world_size * micro_batch
    first = int(num_samples * at) // global_batch * global_batch
    # the slowest rank counts
    slowest = 0.0
    for rank in sorted({0, world_size // 2, world_size - 1}):
        started = time.perf_counter()
        order = Order(sizes, 0, window, lanes, max(1, global_batch // lanes))
        order.locate(np.arange(first + rank * micro_batch, first + (rank + 1) * micro_batch))
        slowest = max(slowest, time.perf_counter() - started)
    return {"seconds_to_first_slot": slowest, "peak_rss_bytes": peak_rss_bytes(), "num_shards": len(sizes)}
