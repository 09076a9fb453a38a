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
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shards.order import Order
from shards.quarantine import Quarantine
from shards.source import Samples, ShardSet, Source
from streamtrain.config.tree import Config
from streamtrain.data.augment import ViewParameters, draw_views
from streamtrain.data.batch import Batch
from streamtrain.data.masking import MaskParameters, draw_masks, max_rows, rasterise
from streamtrain.data.pipeline import CropPipeline, undecodable
from streamtrain.data.views import CpuViews, finish
from streamtrain.errors import CheckpointError, ConfigError

STATE_VERSION = 1
# what must agree for a saved position to mean the same samples
_IDENTITY = ("version", "digest", "seed", "window", "lanes", "lane_block")


def open_shard_set(config: Config) -> ShardSet:
    """The shard set that ``data.shards`` names; call it before any process group starts.

    Raises:
        ConfigError: the key is empty.
        ShardError: there is no such set, or it is not whole.
    """
    if not config.data.shards:
        raise ConfigError("data.shards is not set; pack images with tools/make_shards.py and give data.shards=SET")
    return ShardSet.open(config.data.shards)


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


def check_state(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a stream that is not the saved one (both as from ``Loader.state_dict``).

    Raises:
        CheckpointError: names every differing field with both values.
    """
    differing = [name for name in _IDENTITY if saved.get(name) != current[name]]
    if differing:
        sides = "; ".join(f"{name} was {saved.get(name)!r} and is now {current[name]!r}" for name in differing)
        raise CheckpointError(f"the saved position is one of another stream: {sides}; restore that, or start afresh")


class Loader:
    """Iterator over a rank's micro-batches, forever; a context manager.

    Attributes:
        wait_seconds: time the consumer has waited for batches since it got the first one.
        seconds: all time since then, up to the latest batch; ``wait_seconds / seconds`` is the share lost to data.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        config: Config,
        *,
        rank: int,
        world_size: int,
        device: torch.device | str,
        start_slot: int = 0,
        lane_block: int | None = None,
        local_world_size: int = 1,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Start reading at ``start_slot``.

        Args:
            quarantine: takes note of images that cannot be used, which others then stand in for; without one, the
                first such image ends the stream.
            lane_block: of a resumed stream, from its state; a new one fits it to the global batch.
            local_world_size: ranks that share this machine's cores.

        Raises:
            ShardError: the set holds no samples.
            ValueError: micro-batch x ranks does not divide the global batch.
        """
        global_batch, _ = config.batch_split(world_size)
        # whole lanes a rank where the batch allows it; otherwise more ranks read more shards, nothing else
        self._lane_block = lane_block or max(1, global_batch // config.data.lanes)
        order = Order(
            shard_set.sizes, config.run.seed, config.data.window, config.data.lanes, lane_block=self._lane_block
        )
        slots = micro_batch_slots(start_slot, global_batch, config.data.micro_batch, rank, world_size)
        self._identity = _identity(shard_set, config, self._lane_block)
        self.wait_seconds = 0.0
        self.seconds = 0.0
        self._first_at: float | None = None
        self._failure: BaseException | None = None
        self._ready: queue.Queue[_Finished | BaseException] = queue.Queue(maxsize=1)
        stop = threading.Event()
        threads = config.data.decode_threads or max(1, len(os.sched_getaffinity(0)) // local_world_size)
        source = Source(
            shard_set,
            order,
            threads=config.data.reader_threads,
            max_bytes_in_flight=config.data.read_ahead_bytes,
            quarantine=quarantine,
            max_pixels=config.data.max_pixels,
        )
        self._quarantine = quarantine
        producer = _Producer(source, slots, config, torch.device(device), start_slot, threads)
        # the thread knows nothing of the loader, so that a forgotten loader is collected and stops it
        thread = threading.Thread(target=_produce, args=(producer, self._ready, stop), name="loader", daemon=True)
        self._shut_down = weakref.finalize(self, _shut_down, thread, self._ready, stop)
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
        return item.claim()

    def state_dict(self, next_slot: int) -> dict[str, Any]:
        """What a checkpoint keeps: the stream's identity and the first slot not yet consumed by any rank.

        ``quarantine`` is how many images this process found unusable; the log itself stays in the run folder.
        """
        unusable = self._quarantine.num_entries if self._quarantine is not None else 0
        return {**self._identity, "next_slot": next_slot, "quarantine": unusable}

    def close(self) -> None:
        """Stop the thread, the readers and DALI; may be called twice."""
        self._shut_down()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identity(shard_set: ShardSet, config: Config, lane_block: int) -> dict[str, Any]:
    return {
        "version": STATE_VERSION,
        "digest": shard_set.digest,
        "seed": config.run.seed,
        "window": config.data.window,
        "lanes": config.data.lanes,
        "lane_block": lane_block,
    }


@dataclass
class _Finished:
    """A batch that may still be under way on the loader's CUDA stream."""

    batch: Batch
    event: torch.cuda.Event | None

    def claim(self) -> Batch:
        """The batch, safe to use on the caller's current stream."""
        if self.event is not None:
            batch, stream = self.batch, torch.cuda.current_stream(self.batch.global_crops.device)
            stream.wait_event(self.event)
            masks = batch.masks
            for tensor in (batch.global_crops, batch.local_crops, masks.grid_mask, masks.index, masks.weight):
                tensor.record_stream(stream)
        return self.batch


@dataclass(frozen=True)
class _InFlight:
    """A batch that DALI has been given: enough to feed it again, and to name its samples."""

    samples: Samples
    views: ViewParameters
    masks: MaskParameters


class _Producer:
    """Makes the batches; used by one thread only."""

    def __init__(
        self,
        source: Source,
        slots: Iterator[npt.NDArray[np.int64]],
        config: Config,
        device: torch.device,
        start_slot: int,
        threads: int,
    ) -> None:
        self._source, self._slots = source, slots
        self._config, self._device, self._threads = config, device, threads
        side = config.crops.global_size // config.model.patch_size
        self._grid = (side, side)
        self._mask_rows = max_rows(
            config.masks,
            config.data.micro_batch,
            config.crops.global_count,
            side * side,
            # every micro-batch starts at start_slot plus a multiple of its own size
            int(np.gcd(start_slot, config.data.micro_batch)),
        )

    def batches(self) -> Generator[_Finished, None, None]:
        """The finished batches, in the order of the slots."""
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if on_gpu else None
        cpu_views = None if on_gpu else CpuViews(self._config.crops, self._threads)
        reader = self._source.batches(self._slots)
        pipeline = self._build()
        in_flight: deque[_InFlight] = deque()
        try:
            while True:
                while len(in_flight) < self._config.data.prefetch:
                    in_flight.append(self._prepare(next(reader)))
                    pipeline.feed(in_flight[-1].samples.payloads, in_flight[-1].views)
                try:
                    decoded = pipeline.take(stream)
                except RuntimeError as error:
                    # the pipeline is dead; everything it was given is still here, with its parameters
                    in_flight[0] = self._mend(in_flight[0].samples, error)
                    pipeline = self._build()
                    for item in in_flight:
                        pipeline.feed(item.samples.payloads, item.views)
                    continue
                finished = self._assemble(in_flight.popleft(), decoded, stream, cpu_views)
                del decoded
                pipeline.release()
                yield finished
        finally:
            if cpu_views is not None:
                cpu_views.close()
            self._source.close()

    def _build(self) -> CropPipeline:
        on_gpu = self._device.type == "cuda"
        return CropPipeline(
            self._config.crops,
            self._config.data.micro_batch,
            device="gpu" if on_gpu else "cpu",
            device_id=(self._device.index or 0) if on_gpu else None,
            threads=self._threads,
            prefetch=self._config.data.prefetch,
            cropping=on_gpu,
        )

    def _prepare(self, samples: Samples) -> _InFlight:
        """Draw everything random about the samples."""
        seed, crops = self._config.run.seed, self._config.crops
        return _InFlight(
            samples,
            draw_views(crops, seed, samples.slots, samples.sizes),
            draw_masks(self._config.masks, seed, samples.slots, crops.global_count, self._grid),
        )

    def _assemble(
        self, item: _InFlight, decoded: list[Any], stream: torch.cuda.Stream | None, cpu_views: CpuViews | None
    ) -> _Finished:
        """Views and masks on the device, in memory of our own; ``decoded`` is what DALI hands out."""
        count = self._config.crops.global_count
        # stream(None) does nothing: on the CPU all of this has happened when it returns
        with torch.cuda.stream(stream):
            if cpu_views is not None:
                images = [torch.from_dlpack(image) for image in decoded[0]]
                global_crops, local_crops = cpu_views.make(images, item.views)
            else:
                crops = [torch.from_dlpack(view.as_tensor()) for view in decoded]
                global_crops = finish(crops[:count], item.views, 0)
                size = self._config.crops.local_size
                local_crops = (
                    finish(crops[count:], item.views, count)
                    if self._config.crops.local_count
                    else global_crops.new_empty(0, size, size, 3)
                )
            masks = rasterise(item.masks, self._grid, self._mask_rows, self._device)
            event = None
            if stream is not None:
                event = torch.cuda.Event()
                event.record(stream)
        return _Finished(Batch(item.samples.slots, global_crops, local_crops, masks), event)

    def _mend(self, samples: Samples, error: RuntimeError) -> _InFlight:
        """The batch on which DALI failed, with substitutes for the images that do not decode by themselves.

        Raises:
            RuntimeError: ``error`` again, if each of them does.
        """
        mended = samples
        for row in range(len(samples.slots)):
            # the substitute may be no better
            while (reason := undecodable(mended.payloads[row])) is not None:
                mended = self._source.replace(mended, row, reason)
        if mended is samples:
            raise error
        return self._prepare(mended)


def _produce(producer: _Producer, ready: queue.Queue[_Finished | BaseException], stop: threading.Event) -> None:
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
    thread: threading.Thread, ready: queue.Queue[_Finished | BaseException], stop: threading.Event
) -> None:
    stop.set()
    while thread.is_alive():
        # the thread may be waiting for room in the queue
        try:
            ready.get_nowait()
        except queue.Empty:
            thread.join(timeout=0.02)
