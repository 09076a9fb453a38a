"""Whether a long stream needs more memory the longer it lasts: resident bytes against samples read."""

from __future__ import annotations

import math
import resource
from collections.abc import Generator
from typing import Any

import numpy as np

from benchmarks.process_cost import in_fresh_process, rss_bytes
from shards.reading.source import Source
from streamtrain.config.load import open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader, micro_batch_slots
from streamtrain.data.stream import build_order

WARM_UP_SAMPLES = 50_000  # come before the measurement: pools fill, allocators find their size
BLOCKS = 20
_T_95 = 2.101  # Student's t for BLOCKS - 2 degrees of freedom, two-sided


def run(config: Config, num_samples: int, through_loader: bool) -> dict[str, Any]:
    """Measured in a fresh process.

    Args:
        num_samples: over which the slope is taken, after the warm-up.
        through_loader: decode and augment as well, rather than read alone.
    """
    return in_fresh_process(_measure, config, num_samples, through_loader)


def _measure(config: Config, num_samples: int, through_loader: bool) -> dict[str, Any]:
    batch = config.data.micro_batch
    stream = _decoded(config) if through_loader else _read(config)
    warm_up, measured = math.ceil(WARM_UP_SAMPLES / batch), math.ceil(num_samples / batch)
    resident = np.full(warm_up + measured, 1.0)  # made beforehand: what is measured must not grow by it
    for place in range(len(resident)):
        next(stream)
        resident[place] = rss_bytes()
    resident = resident[warm_up:]
    stream.close()
    slope, error = slope_with_error(resident)
    # memory comes in pages: a single one more, in the middle, makes this slope
    error += 1.5 * resource.getpagesize() / measured
    return {
        "samples": len(resident) * batch,
        "rss_bytes": float(np.mean(resident)),
        "rss_slope_bytes_per_sample": slope / batch,
        "rss_slope_low": (slope - error) / batch,
        "rss_slope_high": (slope + error) / batch,
    }


def slope_with_error(values: np.ndarray) -> tuple[float, float]:
    """The slope of equidistant values [count] by least squares, and half the width of its 95 % interval.

    Neighbouring values hang together, which would make the interval too narrow; means of long blocks hardly do.
    """
    blocks = [block.mean() for block in np.array_split(values, BLOCKS)]
    places = (np.arange(BLOCKS) + 0.5) * len(values) / BLOCKS
    places -= places.mean()
    spread = float((places**2).sum())
    slope = float((places * blocks).sum()) / spread
    residuals = blocks - np.mean(blocks) - slope * places
    return slope, _T_95 * math.sqrt(float((residuals**2).sum()) / (BLOCKS - 2) / spread)


def _read(config: Config) -> Generator[None, None, None]:
    """The reading alone, as the loader has it."""
    shard_set, data = open_shard_set(config), config.data
    total, _ = config.batch_split(1)
    order = build_order(config, shard_set, 1)
    source = Source(shard_set, order, threads=data.reader_threads, max_bytes_in_flight=data.read_ahead_bytes)
    for _ in source.batches(micro_batch_slots(0, total, data.micro_batch, 0, 1)):
        yield
    source.close()


def _decoded(config: Config) -> Generator[None, None, None]:
    with Loader(open_shard_set(config), config, rank=0, world_size=1, device="cpu") as loader:
        for _ in loader:
            yield
