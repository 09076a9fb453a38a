"""Growth of resident memory over a long stream: the slope of resident bytes over samples read."""

from __future__ import annotations

import math
import resource
from collections.abc import Generator
from typing import Any

import numpy as np

from benchmarks.process_usage import rss_bytes, run_in_fresh_process
from shards.reading.source import Source
from streamtrain.config.load import open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader, micro_batch_slots
from streamtrain.data.stream import build_stream_order

WARM_UP_SAMPLES = 50_000  # read before the measurement, until pools and allocators reach their size
BLOCKS = 20
_T_95 = 2.101  # two-sided 95 % quantile of Student's t with BLOCKS - 2 degrees of freedom


def run(config: Config, num_samples: int, through_loader: bool) -> dict[str, Any]:
    """Measure in a fresh process.

    Args:
        num_samples: samples to measure the slope over, after the warm-up.
        through_loader: decode and augment too, instead of reading only.
    """
    return run_in_fresh_process(_measure, config, num_samples, through_loader)


def _measure(config: Config, num_samples: int, through_loader: bool) -> dict[str, Any]:
    batch = config.data.micro_batch
    stream = _load_batches(config) if through_loader else _read_batches(config)
    warm_up, measured = math.ceil(WARM_UP_SAMPLES / batch), math.ceil(num_samples / batch)
    resident = np.full(warm_up + measured, 1.0)  # allocated before, so that it does not add to the measurement
    for batch_index in range(len(resident)):
        next(stream)
        resident[batch_index] = rss_bytes()
    resident = resident[warm_up:]
    stream.close()
    slope, error = slope_with_error(resident)
    # memory is allocated in pages: one more page in the middle gives this slope
    error += 1.5 * resource.getpagesize() / measured
    return {
        "samples": len(resident) * batch,
        "rss_bytes": float(np.mean(resident)),
        "rss_slope_bytes_per_sample": slope / batch,
        "rss_slope_low": (slope - error) / batch,
        "rss_slope_high": (slope + error) / batch,
    }


def slope_with_error(values: np.ndarray) -> tuple[float, float]:
    """Return the least-squares slope of equidistant values [count] and half the width of its 95 % interval.

    Neighbouring values are correlated, which would make the interval too narrow, so it uses means of long blocks.
    """
    blocks = [block.mean() for block in np.array_split(values, BLOCKS)]
    positions = (np.arange(BLOCKS) + 0.5) * len(values) / BLOCKS
    positions -= positions.mean()
    spread = float((positions**2).sum())
    slope = float((positions * blocks).sum()) / spread
    residuals = blocks - np.mean(blocks) - slope * positions
    return slope, _T_95 * math.sqrt(float((residuals**2).sum()) / (BLOCKS - 2) / spread)


def _read_batches(config: Config) -> Generator[None, None, None]:
    """Read samples as the loader does, without decoding."""
    shard_set, data = open_shard_set(config), config.data
    total, _ = config.batch_split(1)
    order = build_stream_order(config, shard_set, 1)
    source = Source(shard_set, order, threads=data.reader_threads, max_bytes_in_flight=data.read_ahead_bytes)
    for _ in source.batches(micro_batch_slots(0, total, data.micro_batch, 0, 1)):
        yield
    source.close()


def _load_batches(config: Config) -> Generator[None, None, None]:
    with Loader(open_shard_set(config), config, rank=0, world_size=1, device="cpu") as loader:
        for _ in loader:
            yield
