"""The endless stream of micro-batches: shard source → DALI → ``Batch`` on the compute device.

A background thread feeds DALI and puts finished batches into a short queue. Its only state is the next slot: every
sample is a pure function of (seed, slot), so the pixels do not depend on the start slot, the number of ranks or a
rebuilt pipeline.
"""

from __future__ import annotations

import itertools
import math
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
from shards.reading.random_window import RandomWindow
from shards.reading.source import Source
from streamtrain.config.tree import Config
from streamtrain.data.augment import SizeSchedule
from streamtrain.data.augmentations import UserAugmentation
from streamtrain.data.batch import Batch
from streamtrain.data.producer import PendingBatch, Producer
from streamtrain.data.stream import build_stream_order, open_cache, stream_identity


def micro_batch_slots(
    start_slot: int, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the slots int64 [micro_batch] of a rank's micro-batches, endlessly.

    Every step consumes the next ``global_batch`` slots; each rank takes a contiguous part in micro-batches.
    """
    share = global_batch // world_size
    for step in itertools.count():
        first = start_slot + step * global_batch + rank * share
        for offset in range(0, share, micro_batch):
            yield np.arange(first + offset, first + offset + micro_batch, dtype=np.int64)


class Loader:
    """Endless iterator over a rank's micro-batches, and a context manager that closes it.

    Attributes:
        wait_seconds: time the consumer has waited for batches after the first.
        seconds: time from the first batch to the latest; ``wait_seconds / seconds`` is the share spent waiting.
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
        cores: int | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Start reading at ``start_slot``.

        Args:
            end_slot: end of the run, after which no shard is copied to the cache; None for an endless stream.
            quarantine: log of unusable images, which are replaced; without one, the first unusable image raises.
            lane_block: value from the saved state of a resumed stream; None derives it from the global batch.
            cores: number of CPU cores for this rank; None: all that are available.

        Raises:
            ShardError: a set has no samples, or its weight in a mixture is too small.
            UserCodeError: ``data.augmentations`` cannot be imported.
            ValueError: micro-batch x ranks does not divide the global batch.
        """
        global_batch, _ = config.batch_split(world_size)
        own = config.data.augmentations
        augmentation = None if own is None else UserAugmentation(own, config.run.seed)
        order = build_stream_order(config, shard_set, world_size, lane_block)
        slots = micro_batch_slots(start_slot, global_batch, config.data.micro_batch, rank, world_size)
        self._identity = stream_identity(shard_set, order)
        self.wait_seconds = 0.0
        self.seconds = 0.0
        self._first_at: float | None = None
        # side of the latest global crops in pixels, or of squares of their area, if several sizes alternate
        self._side: float | None = None
        self._has_several_sizes = len(config.crop_sizes) > 1
        self._failure: BaseException | None = None
        ahead = config.batches_ahead(world_size, on_gpu=torch.device(device).type == "cuda")
        self._ready: queue.Queue[PendingBatch | BaseException] = queue.Queue(maxsize=ahead)
        stop = threading.Event()
        threads = config.data.decode_threads or cores or len(os.sched_getaffinity(0))
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
            window=None if config.crops.window is None else RandomWindow(config.crops.window, config.run.seed),
            on_read=None if self._cache is None else self._cache.mark_consumed,
        )
        self._quarantine, self._source = quarantine, source
        schedule = SizeSchedule(config, global_batch, start_slot)
        producer = Producer(source, slots, config, torch.device(device), schedule, start_slot, threads, augmentation)
        # the thread holds no reference to the loader, so an unreferenced loader is collected and stops the thread
        thread = threading.Thread(target=_produce, args=(producer, self._ready, stop), name="loader", daemon=True)
        self._shut_down = weakref.finalize(self, _shut_down, thread, self._ready, stop, self._cache)
        thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """Return the next micro-batch.

        Raises:
            SampleError: an image cannot be read or decoded and there is no quarantine; names shard, index and key.
            ShardError: too many images are unusable.
            UserCodeError: ``data.augmentations`` failed.
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
        batch = item.wait()
        if self._has_several_sizes:
            self._side = math.sqrt(batch.global_crops.shape[1] * batch.global_crops.shape[2])
        return batch

    def state_dict(self, next_slot: int) -> dict[str, Any]:
        """Return the state for a checkpoint: the stream's identity and the first slot not yet consumed by any rank.

        ``quarantine`` is the number of unusable images in this process; the log itself stays in the run directory.
        """
        unusable = self._quarantine.num_entries if self._quarantine is not None else 0
        return {**self._identity, "next_slot": next_slot, "quarantine": unusable}

    def scalars(self) -> dict[str, float]:
        """Return this rank's running counts by metric tag, and the latest global crop size if several alternate."""
        scalars = {} if self._side is None else {"data/global_size": self._side}
        if self._quarantine is not None:
            scalars["data/quarantined"] = float(self._quarantine.num_entries)
        if self._remote_set is not None:
            traffic = self._remote_set.traffic
            scalars["data/downloaded_bytes"] = float(traffic.num_bytes)
            scalars["data/retries"] = float(traffic.num_retries)
        if self._cache is not None and (opened := self._cache.hits + self._cache.misses):
            scalars["data/cache_hit_share"] = self._cache.hits / opened
        return scalars

    def describe_samples(self, slots: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return slot, shard (tar name), index in the shard and WebDataset key of the image at each slot.

        Reads the keys from the shards.
        """
        shard_set = self._source.shard_set
        return [
            {"slot": slot, "shard": shard_set.name(shard), "index": index, "key": shard_set.key(shard, index)}
            for slot, (shard, index) in zip(slots.tolist(), self._source.locate(slots), strict=True)
        ]

    def close(self) -> None:
        """Stop the thread, the readers and DALI; idempotent."""
        self._shut_down()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(producer: Producer, ready: queue.Queue[PendingBatch | BaseException], stop: threading.Event) -> None:
    """Fill the queue until ``stop`` is set; an exception becomes the last item."""
    batches = producer.batches()
    try:
        while not stop.is_set():
            ready.put(next(batches))
    except BaseException as error:
        ready.put(error)
    finally:
        # ends DALI's threads, since the generator holds the pipeline
        batches.close()


def _shut_down(
    thread: threading.Thread,
    ready: queue.Queue[PendingBatch | BaseException],
    stop: threading.Event,
    cache: ShardCache | None,
) -> None:
    stop.set()
    if cache is not None:
        cache.close()  # first: readers may be waiting for a shard
    while thread.is_alive():
        # make room: the thread may be blocked on a full queue
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(timeout=0.02)
