"""Throughput, CPU time and memory of the loader, alone and against a webdataset loop."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from benchmarks.process_usage import cpu_seconds, peak_rss_bytes, run_in_fresh_process, wait_until_idle
from benchmarks.webdataset_loader import batches as webdataset_batches
from streamtrain.config.load import open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.errors import ConfigError

WARM_UP = 3


def run(config: Config, num_batches: int, step_seconds: float, device: str, compare: bool) -> dict[str, Any]:
    """Measure ``num_batches`` micro-batches; the consumer spends ``step_seconds`` on each.

    ``ratio`` compares images per CPU-second with the webdataset loop. The two are measured interleaved, so that other
    load on the machine affects both.
    """
    rounds = 2 if compare else 1
    own_runs, webdataset_runs = [], []
    for _ in range(rounds):
        own_runs.append(run_in_fresh_process(measure, config, num_batches // rounds, step_seconds, device))
        if compare:
            webdataset_runs.append(run_in_fresh_process(measure_webdataset, config, num_batches // rounds))
    result = _merge(own_runs)
    if compare:
        other = _merge(webdataset_runs)
        result |= {f"webdataset_{key}": value for key, value in other.items()}
        result["ratio"] = other["cpu_seconds_per_image"] / result["cpu_seconds_per_image"]
    return result


def measure(config: Config, num_batches: int, step_seconds: float, device: str) -> dict[str, float]:
    """Measure the loader in this process; the measurement starts and ends with full queues and idle threads."""
    shard_set = open_shard_set(config)
    with Loader(shard_set, config, rank=0, world_size=1, device=device) as loader:
        for _ in range(WARM_UP):
            next(loader)
        wait_until_idle()
        waited, started, cpu = loader.wait_seconds, time.perf_counter(), cpu_seconds()
        for _ in range(num_batches):
            next(loader)
            if step_seconds:
                time.sleep(step_seconds)
        waited, consumed = loader.wait_seconds - waited, time.perf_counter() - started
        ended = wait_until_idle()
        cpu = cpu_seconds() - cpu
    return {
        "images": num_batches * config.data.micro_batch,
        "seconds": max(ended - started, consumed),
        "cpu_seconds": cpu,
        "peak_rss_bytes": peak_rss_bytes(),
        "wait_share": waited / consumed,
    }


def measure_webdataset(config: Config, num_batches: int) -> dict[str, float]:
    """Measure the webdataset loop in this process.

    Raises:
        ConfigError: ``data.shards`` lists several shard sets, which the loop cannot mix.
    """
    if not isinstance(config.data.shards, str):
        raise ConfigError("data.shards lists several sets; --compare webdataset takes one")
    stream = webdataset_batches(Path(config.data.shards), config.crops, config.data.micro_batch)
    for _ in itertools.islice(stream, WARM_UP):
        pass
    started, cpu = time.perf_counter(), cpu_seconds()
    for _ in itertools.islice(stream, num_batches):
        pass
    return {
        "images": num_batches * config.data.micro_batch,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu_seconds() - cpu,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _merge(parts: list[dict[str, float]]) -> dict[str, Any]:
    images, seconds = sum(p["images"] for p in parts), sum(p["seconds"] for p in parts)
    merged: dict[str, Any] = {
        "images_per_second": images / seconds,
        "cpu_seconds_per_image": sum(p["cpu_seconds"] for p in parts) / images,
        "peak_rss_bytes": max(int(p["peak_rss_bytes"]) for p in parts),
    }
    if "wait_share" in parts[0]:
        merged["wait_share"] = sum(p["wait_share"] for p in parts) / len(parts)
    return merged
