"""What a rank reads of the stream: which order, whose lanes, and through which local copies. Free of torch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from shards.reading.cache import ShardCache, copy_bytes, min_cache_bytes
from shards.reading.ledger import Ledger, available_bytes
from shards.reading.mixture import AnyOrder, AnySet, Mixture, build_order
from shards.reading.order import Order
from streamtrain.config.tree import Config
from streamtrain.errors import CheckpointError, ConfigError

STATE_VERSION = 1
# all else in a saved state must agree, for its position to mean the same samples
_POSITION = ("next_slot", "quarantine")
# what follows from the images alone, and may be another when that is asked for
_OF_THE_SETS = ("digest", "cycle", "counts")
_SLOTS_LOOKED_AT = 1 << 20


def order_of(config: Config, shard_set: AnySet, world_size: int, lane_block: int | None = None) -> Order | Mixture:
    """The order of a run's stream.

    Args:
        lane_block: of a resumed stream, from its state; a new one fits it to the global batch.

    Raises:
        ShardError: a set holds no samples, or its weight in a mixture is too small.
        ConfigError: micro-batch x ranks does not divide the global batch.
    """
    global_batch, _ = config.batch_split(world_size)
    data = config.data
    # whole lanes a rank where the batch allows it; otherwise more ranks read more shards, nothing else
    lane_block = lane_block or max(1, global_batch // data.lanes)
    return build_order(shard_set, config.run.seed, data.window, data.lanes, lane_block)


def identity_of(shard_set: AnySet, order: Order | Mixture) -> dict[str, Any]:
    """What defines a stream, as a checkpoint keeps it."""
    return {"version": STATE_VERSION, "digest": shard_set.digest, **order.parameters}


def check_state(saved: dict[str, Any], current: dict[str, Any], accept_changes: bool = False) -> list[str]:
    """Refuse to continue a stream that is not the saved one (both as from ``identity_of``, or with a position).

    Args:
        accept_changes: go on at the same slot of other images; these changes are returned, as text.

    Raises:
        CheckpointError: names every differing field with both values.
    """
    differing = [
        name for name in {**current, **saved} if name not in _POSITION and saved.get(name) != current.get(name)
    ]
    sides = [f"{name} was {saved.get(name)!r} and is now {current.get(name)!r}" for name in differing]
    only_sets = set(differing) <= set(_OF_THE_SETS)
    if differing and not (accept_changes and only_sets):
        flag = ", or add --accept-changes to go on with the new images" if only_sets else ""
        raise CheckpointError(
            f"the saved position is one of another stream: {'; '.join(sides)}; restore that, or start afresh{flag}"
        )
    return sides


def lanes_read(order: AnyOrder, global_batch: int, start_slot: int, share: range) -> frozenset[int]:
    """The lanes that serve a share of every batch (such as ``range(0, 8)``, its first eight samples)."""
    period = math.lcm(global_batch, order.lane_cycle)
    steps = period // global_batch
    if steps * len(share) > _SLOTS_LOOKED_AT:
        return frozenset(range(order.num_lanes))  # more than the truth does no harm but to the speed
    firsts = start_slot + np.arange(steps) * global_batch
    slots = (firsts[:, None] + np.asarray(share)).reshape(-1)
    return frozenset(np.unique(order.lanes_of(slots)).tolist())


def check_cache(
    config: Config, shard_set: AnySet, order: AnyOrder, rank: int, world_size: int, local_world_size: int
) -> None:
    """Whether ``data.cache`` makes sense, is large enough for what the ranks of this machine read, and has the disk.

    Raises:
        ConfigError: it is not so; names the bytes that are needed.
    """
    cache = config.data.cache
    if cache.dir is None or cache.limit is None:
        return
    entries = [remote.entry for shard in range(shard_set.num_shards) if (remote := shard_set.remote_shard(shard))]
    if not entries:
        raise ConfigError(f"data.cache has no effect: {config.data.shards_text} is on this machine; leave it out")
    global_batch, _ = config.batch_split(world_size)
    samples, first_rank = global_batch // world_size, rank // local_world_size * local_world_size
    share = range(samples * first_rank, samples * min(first_rank + local_world_size, world_size))
    lanes = len(lanes_read(order, global_batch, 0, share))
    needed = min_cache_bytes(entries, lanes * config.data.window, local_world_size)
    if cache.limit < needed:
        raise ConfigError(
            f"data.cache.limit is {cache.limit} bytes, but the shards that this machine reads at a time need {needed} "
            f"({lanes} lanes x data.window {config.data.window} shards); raise it, or lower data.window or data.lanes"
        )
    wanted, space = min(cache.limit, sum(map(copy_bytes, entries))), available_bytes(Path(cache.dir).expanduser())
    if space < wanted:
        raise ConfigError(
            f"data.cache may come to {wanted} bytes, but its disk has room for {space}; lower data.cache.limit, or set "
            "data.cache.dir to a folder elsewhere"
        )


def try_cache(config: Config) -> None:
    """Open the folder of ``data.cache`` and leave it again.

    Raises:
        ShardError: it cannot be used.
    """
    cache = config.data.cache
    if cache.dir is not None and cache.limit is not None:
        Ledger(Path(cache.dir).expanduser(), cache.limit).close()


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
    """Begin to copy what a rank is going to read from ``start_slot`` on; None without ``data.cache``.

    Args:
        end_slot: where the run ends, and nothing further need be copied; None: never.

    Raises:
        ShardError: the folder cannot be used.
    """
    cache = config.data.cache
    if cache.dir is None or cache.limit is None:
        return None
    global_batch, _ = config.batch_split(world_size)
    samples = global_batch // world_size
    lanes = lanes_read(order, global_batch, start_slot, range(samples * rank, samples * (rank + 1)))
    blocks = order.windows(start_slot, lanes)
    return ShardCache(
        Ledger(Path(cache.dir).expanduser(), cache.limit),
        shard_set.remote_shard,
        itertools.takewhile(lambda block: end_slot is None or block.first_slot < end_slot, blocks),
        start_slot=start_slot,
        horizon_slots=2 * shard_set.num_samples,
        downloads=cache.downloads,
    )
