"""The endless stream of micro-batches: shard source → DALI → ``Batch`` on the compute device.

A background thread keeps DALI fed and puts finished batches into a short queue; the consumer only takes them. The
thread has no state but the next slot: everything about a sample follows from (seed, slot), so starting at another slot,
on other ranks or after a rebuilt pipeline repeats the same pixels.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shards.reading.cache import ShardCache
from shards.reading.mixture import AnySet
from shards.reading.quarantine import Quarantine
from shards.reading.source import Source
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.data.producer import Finished, Producer
from streamtrain.data.sizes import SizeChoice
from streamtrain.data.stream import identity_of, open_cache, order_of


def micro_batch_slots(
    start_slot: int, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[npt.NDArray[np.int64]]:
    """The slots int64 [micro_batch] of each of a rank's micro-batches, forever.

    Every step takes the next ``global_batch`` slots; each rank has a contiguous part, cut into micro-batches.
    """
    share = global_batch // world_size
    for step in itertools.count():
        first = start_slot + step * global_batch + rank * share
        for offset in range(0, share, micro_batch):
            yield np.arange(first + offset, first + offset + micro_batch, dtype=np.int64)


class Loader:
    """Iterator over a rank's micro-batches, forever; a context manager.

    Attributes:
        wait_seconds: time the consumer has waited for batches since it got the first one.
        seconds: all time since then, up to the latest batch; ``wait_seconds / seconds`` is the share lost to data.
    """

    def __init__(
        self,
        shard_set: AnySet,
        config: Config,
        *,
        rank: int,
        world_size: int,
        device: torch.device | str,
        start_slot: int = 0,
        end_slot: int | None = None,
        lane_block: int | None = None,
        local_world_size: int = 1,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Start reading at ``start_slot``.

        Args:
            end_slot: where the run ends; nothing that is read only later is copied to the cache.
            quarantine: takes note of images that cannot be used, which others then stand in for; without one, the
                first such image ends the stream.
            lane_block: of a resumed stream, from its state; a new one fits it to the global batch.
            local_world_size: ranks that share this machine's cores.

        Raises:
            ShardError: a set holds no samples, or its weight in a mixture is too small.
            ValueError: micro-batch x ranks does not divide the global batch.
        """
        global_batch, _ = config.batch_split(world_size)
        order = order_of(config, shard_set, world_size, lane_block)
        slots = micro_batch_slots(start_slot, global_batch, config.data.micro_batch, rank, world_size)
        self._identity = identity_of(shard_set, order)
        self.wait_seconds = 0.0
        self.seconds = 0.0
        self._first_at: float | None = None
        # side in pixels of the latest global crops, where it changes from step to step
        self._size: int | None = None
        self._several_sizes = len(config.crop_sizes) > 1
        self._failure: BaseException | None = None
        self._ready: queue.Queue[Finished | BaseException] = queue.Queue(maxsize=1)
        stop = threading.Event()
        threads = config.data.decode_threads or max(1, len(os.sched_getaffinity(0)) // local_world_size)
        self._cache = open_cache(
            config, shard_set, order, rank=rank, world_size=world_size, start_slot=start_slot, end_slot=end_slot
        )
        self._remote_set = shard_set if shard_set.is_remote else None
        source = Source(
            shard_set if self._cache is None else shard_set.with_copies(self._cache),
            order,
            threads=config.data.reader_threads,
            max_bytes_in_flight=config.data.read_ahead_bytes,
            quarantine=quarantine,
            max_pixels=config.data.max_pixels,
            on_read=None if self._cache is None else self._cache.mark_consumed,
        )
        self._quarantine, self._source = quarantine, source
        choice = SizeChoice(config, global_batch, start_slot)
        producer = Producer(source, slots, config, torch.device(device), choice, start_slot, threads)
        # the thread knows nothing of the loader, so that a forgotten loader is collected and stops it
        thread = threading.Thread(target=_produce, args=(producer, self._ready, stop), name="loader", daemon=True)
        self._shut_down = weakref.finalize(self, _shut_down, thread, self._ready, stop, self._cache)
        thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            SampleError: an image cannot be read or decoded, and there is no quarantine; names shard, index and key.
            ShardError: far too many images cannot be used.
        """
        if self._failure is not None:
            raise self._failure
        assert self._shut_down.alive, "the loader is closed"
        asked_at = time.perf_counter()
        item = self._ready.get()
        now = time.perf_counter()
        if isinstance(item, BaseException):
            self._failure = item
            self.close()
            raise item
        if self._first_at is None:
            self._first_at = now
        else:
            self.wait_seconds += now - asked_at
            self.seconds = now - self._first_at
        batch = item.claim()
        if self._several_sizes:
            self._size = batch.global_crops.shape[1]
        return batch

    def state_dict(self, next_slot: int) -> dict[str, Any]:
        """What a checkpoint keeps: the stream's identity and the first slot not yet consumed by any rank.

        ``quarantine`` is how many images this process found unusable; the log itself stays in the run folder.
        """
        unusable = self._quarantine.num_entries if self._quarantine is not None else 0
        return {**self._identity, "next_slot": next_slot, "quarantine": unusable}

    def scalars(self) -> dict[str, float]:
        """Running counts of this rank, under the tags that they are logged by; of a remote set also its traffic.

        Where several sizes of crops alternate, also that of the latest global crops, in pixels.
        """
        scalars = {} if self._size is None else {"data/global_size": float(self._size)}
        if self._quarantine is not None:
            scalars["data/quarantined"] = float(self._quarantine.num_entries)
        if self._remote_set is not None:
            traffic = self._remote_set.traffic
            scalars["data/downloaded_bytes"] = float(traffic.num_bytes)
            scalars["data/retries"] = float(traffic.num_retries)
        if self._cache is not None and (opened := self._cache.hits + self._cache.misses):
            scalars["data/cache_hit_share"] = self._cache.hits / opened
        return scalars

    def names(self, slots: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Which image stood at each slot, for people: slot, shard (name of the tar), index in it and WebDataset key.

        Reads a little of the shards, for the keys.
        """
        shard_set = self._source.shard_set
        return [
            {"slot": slot, "shard": shard_set.name(shard), "index": index, "key": shard_set.key(shard, index)}
            for slot, (shard, index) in zip(slots.tolist(), self._source.locate(slots), strict=True)
        ]

    def close(self) -> None:
        """Stop the thread, the readers and DALI; may be called twice."""
        self._shut_down()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(producer: Producer, ready: queue.Queue[Finished | BaseException], stop: threading.Event) -> None:
    """The thread: fill the queue until told to stop; a failure is the last item."""
    batches = producer.batches()
    try:
        while not stop.is_set():
            ready.put(next(batches))
    except BaseException as error:
        ready.put(error)
    finally:
        # DALI's threads end here, with the pipeline that the generator holds
        batches.close()


def _shut_down(
    thread: threading.Thread,
    ready: queue.Queue[Finished | BaseException],
    stop: threading.Event,
    cache: ShardCache | None,
) -> None:
    stop.set()
    if cache is not None:
        cache.close()  # first, since readers may be waiting for a shard
    while thread.is_alive():
        # the thread may be waiting for room in the queue
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(timeout=0.02)
