"""The part of the stream that a rank reads: its order and lanes, and the cache of remote shards. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from shards.reading.cache import ShardCache, copy_bytes, min_cache_bytes
from shards.reading.ledger import Ledger, available_bytes
from shards.reading.mixture import AnyOrder, AnySet, Mixture, build_order
from shards.reading.order import Order
from streamtrain.config.section import is_accepted
from streamtrain.config.tree import Config
from streamtrain.errors import CheckpointError, ConfigError

STATE_VERSION = 1
# fields of the position; it refers to the same samples only if all other fields match
_POSITION_FIELDS = ("next_slot", "quarantine")
# fields that depend on the images only; the user may accept a change of them
_SET_FIELDS = ("digest", "cycle", "counts")
_MAX_SLOTS_CHECKED = 1 << 20


def build_stream_order(
    config: Config, shard_set: AnySet, world_size: int, lane_block: int | None = None
) -> Order | Mixture:
    """Build the order of a run's stream.

    Args:
        lane_block: value from the saved state of a resumed stream; None derives it from the global batch.

    Raises:
        ShardError: a set has no samples, or its weight in a mixture is too small.
        ConfigError: micro-batch x ranks does not divide the global batch.
    """
    global_batch, _ = config.batch_split(world_size)
    data = config.data
    # whole lanes per rank if the batch allows it; otherwise more ranks read more shards, without other effects
    lane_block = lane_block or max(1, global_batch // data.lanes)
    return build_order(shard_set, config.run.seed, data.window, data.lanes, lane_block)


def stream_identity(shard_set: AnySet, order: Order | Mixture) -> dict[str, Any]:
    """Return the fields that define a stream, as a checkpoint stores them."""
    return {"version": STATE_VERSION, "digest": shard_set.digest, **order.parameters}


def check_state(saved: dict[str, Any], current: dict[str, Any], accepted: Collection[str] = ()) -> list[str]:
    """Check that a stream is the saved one; both are results of ``stream_identity``, with or without a position.

    Args:
        accepted: with ``data.shards``, other images may be at the same slot; the changes are returned as text.

    Raises:
        CheckpointError: names every differing field with both values.
    """
    differing = [
        name for name in {**current, **saved} if name not in _POSITION_FIELDS and saved.get(name) != current.get(name)
    ]
    changes = [f"{name} was {saved.get(name)!r} and is now {current.get(name)!r}" for name in differing]
    only_sets = set(differing) <= set(_SET_FIELDS)
    if differing and not (only_sets and is_accepted("data.shards", accepted)):
        flag = ", or add --accept data.shards to continue with the new images" if only_sets else ""
        raise CheckpointError(
            f"the checkpoint belongs to a different stream: {'; '.join(changes)}; restore these settings, or start a "
            f"new run{flag}"
        )
    return changes


def find_lanes(order: AnyOrder, global_batch: int, start_slot: int, share: range) -> frozenset[int]:
    """Return the lanes that serve a share of every batch; ``range(0, 8)`` is the share of its first eight samples."""
    period = math.lcm(global_batch, order.lane_cycle)
    steps = period // global_batch
    if steps * len(share) > _MAX_SLOTS_CHECKED:
        return frozenset(range(order.lanes))  # a superset is correct, only slower
    firsts = start_slot + np.arange(steps) * global_batch
    slots = (firsts[:, None] + np.asarray(share)).reshape(-1)
    return frozenset(np.unique(order.lanes_of(slots)).tolist())


def check_cache(
    config: Config, shard_set: AnySet, order: AnyOrder, rank: int, world_size: int, local_world_size: int
) -> None:
    """Check that ``data.cache`` has an effect, holds the shards in use on this machine, and fits on its disk.

    Raises:
        ConfigError: a check failed; names the required bytes.
    """
    cache = config.data.cache
    if cache.dir is None or cache.limit is None:
        return
    entries = [remote.entry for shard in range(shard_set.num_shards) if (remote := shard_set.remote_shard(shard))]
    if not entries:
        raise ConfigError(f"data.cache has no effect: {config.data.shards_text} is on this machine; remove data.cache")
    global_batch, _ = config.batch_split(world_size)
    samples, first_rank = global_batch // world_size, rank // local_world_size * local_world_size
    share = range(samples * first_rank, samples * min(first_rank + local_world_size, world_size))
    lanes = len(find_lanes(order, global_batch, 0, share))
    needed = min_cache_bytes(entries, lanes * config.data.window, local_world_size)
    if cache.limit < needed:
        raise ConfigError(
            f"data.cache.limit is {cache.limit} bytes, but the shards that this machine reads at a time need {needed} "
            f"({lanes} lanes x data.window {config.data.window} shards); raise it, or lower data.window or data.lanes"
        )
    required, free = min(cache.limit, sum(map(copy_bytes, entries))), available_bytes(Path(cache.dir))
    if free < required:
        raise ConfigError(
            f"data.cache may use {required} bytes, but its disk has {free} bytes free; lower data.cache.limit, or set "
            "data.cache.dir to a folder on another disk"
        )


def check_cache_folder(config: Config) -> None:
    """Open and close the folder of ``data.cache``.

    Raises:
        ShardError: the folder cannot be used.
    """
    cache = config.data.cache
    if cache.dir is not None and cache.limit is not None:
        Ledger(Path(cache.dir), cache.limit).close()


def open_cache(
    config: Config,
    shard_set: AnySet,
    order: AnyOrder,
    *,
    rank: int,
    world_size: int,
    start_slot: int,
    end_slot: int | None,
) -> ShardCache | None:
    """Start copying the shards that a rank reads from ``start_slot`` on; return None without ``data.cache``.

    Args:
        end_slot: end of the run, after which no shard is copied; None for an endless stream.

    Raises:
        ShardError: the folder cannot be used.
    """
    cache = config.data.cache
    if cache.dir is None or cache.limit is None:
        return None
    global_batch, _ = config.batch_split(world_size)
    samples = global_batch // world_size
    lanes = find_lanes(order, global_batch, start_slot, range(samples * rank, samples * (rank + 1)))
    blocks = order.windows(start_slot, lanes)
    return ShardCache(
        Ledger(Path(cache.dir), cache.limit),
        shard_set.remote_shard,
        itertools.takewhile(lambda block: end_slot is None or block.first_slot < end_slot, blocks),
        start_slot=start_slot,
        horizon_slots=2 * shard_set.num_samples,
        downloads=cache.downloads,
    )
