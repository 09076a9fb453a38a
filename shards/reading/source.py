"""From slots to the bytes of images: threads that read ahead of the consumer, in order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shards.errors import SampleError, ShardError
from shards.format.index import RECORD, UNREADABLE
from shards.reading.order import SlotOrder
from shards.reading.quarantine import MAX_IN_A_ROW, Quarantine
from shards.reading.shard_set import Readable, ShardSet

__all__ = ["Samples", "ShardSet", "Source"]

_SAMPLES_PER_TASK = 8
_BATCHES_AHEAD = 16


@dataclass(frozen=True)
class Samples:
    """The images of a list of slots, still encoded; B is the number of slots."""

    slots: np.ndarray  # int64 [B]
    payloads: list[np.ndarray]  # B arrays uint8 [num_bytes]
    sizes: np.ndarray  # int32 [B, 2]: width, height in pixels as displayed
    labels: np.ndarray  # int32 [B]: -1 where there is none
    shards: np.ndarray  # int64 [B]
    samples: np.ndarray  # int64 [B]


@dataclass(frozen=True)
class _Plan:
    """A batch that is to be read."""

    slots: np.ndarray
    places: list[tuple[int, int]]  # (shard, sample) of each slot
    num_bytes: int


@dataclass(frozen=True)
class _Image:
    """What stands at one slot."""

    shard: int
    sample: int
    record: np.void
    payload: bytes


_Pending = tuple[_Plan, list[Future[list[_Image]]]]


class Source:
    """Reads the images of slots with a few threads, ahead of the consumer, in order, in bounded memory.

    Args:
        shard_set: where the images lie.
        order: which image stands at which slot.
        threads: readers; they wait on the disk and compute checksums.
        max_bytes_in_flight: bound on the encoded images held ahead of the consumer. A batch that is larger
            than this by itself is read alone.
        quarantine: takes note of unusable images, which are then replaced by others, chosen by the slot alone; without
            one, an unusable image is an error.
        max_pixels: images with more pixels are unusable.
        on_read: told the slot up to which everything was read, after each of the ``batches``; the slots must ascend.
    """

    def __init__(
        self,
        shard_set: Readable,
        order: SlotOrder,
        *,
        threads: int = 4,
        max_bytes_in_flight: int = 256 << 20,
        quarantine: Quarantine | None = None,
        max_pixels: int | None = None,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        self.shard_set, self.order, self.max_bytes_in_flight = shard_set, order, max_bytes_in_flight
        self.quarantine, self.max_pixels = quarantine, max_pixels
        self._on_read = on_read
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-reader")

    def batches(self, slot_lists: Iterable[np.ndarray]) -> Iterator[Samples]:
        """The images of each list of slots (int64 [B]), in the order of the lists.

        Raises:
            SampleError: an image is unusable, and there is no quarantine.
            ShardError: an index cannot be read, or too many images are unusable.
        """
        plans = map(self._plan, slot_lists)
        following = next(plans, None)
        pending: deque[_Pending] = deque()
        bytes_ahead = 0
        try:
            while following is not None or pending:
                while following is not None and len(pending) < _BATCHES_AHEAD:
                    if pending and bytes_ahead + following.num_bytes > self.max_bytes_in_flight:
                        break
                    bytes_ahead += following.num_bytes
                    pending.append(self._start(following))
                    following = next(plans, None)
                batch = self._finish(pending[0])
                bytes_ahead -= pending.popleft()[0].num_bytes
                if self._on_read is not None:
                    self._on_read(int(batch.slots[-1]) + 1)
                yield batch
        finally:
            for _, parts in pending:
                for part in parts:
                    part.cancel()

    def fetch(self, slots: np.ndarray) -> Samples:
        """The images of one list of slots (int64 [B]), read now. Raises as ``batches`` does."""
        return self._finish(self._start(self._plan(slots)))

    def replace(self, batch: Samples, row: int, reason: str) -> Samples:
        """The batch with another image in a row whose image does not decode; raises as ``batches`` does.

        Args:
            reason: what the decoder said, for the log.
        """
        slot, shard, sample = int(batch.slots[row]), int(batch.shards[row]), int(batch.samples[row])
        error = SampleError(self.shard_set.name(shard), sample, self.shard_set.key(shard, sample), reason)
        if self.quarantine is None:
            raise error
        self.quarantine.add(slot, error, "decode")
        image = self._image(slot, shard, sample)
        payloads = list(batch.payloads)
        payloads[row] = np.frombuffer(image.payload, dtype=np.uint8)
        sizes, labels, shards, samples = (
            column.copy() for column in (batch.sizes, batch.labels, batch.shards, batch.samples)
        )
        sizes[row] = image.record["width"], image.record["height"]
        labels[row], shards[row], samples[row] = image.record["label"], image.shard, image.sample
        return Samples(batch.slots, payloads, sizes, labels, shards, samples)

    def places(self, slots: np.ndarray) -> list[tuple[int, int]]:
        """(shard, sample) of the images at slots (int64 [B]); substitutes for those that are known to be unusable."""
        _, shards, samples = self.order.locate(slots)
        found = []
        for slot, shard, sample in zip(slots.tolist(), shards.tolist(), samples.tolist(), strict=True):
            for attempt in range(MAX_IN_A_ROW):
                if self.quarantine is None or not self.quarantine.holds(slot, self.shard_set.name(shard), sample):
                    break
                shard, sample = self.order.substitute(slot, attempt)
            found.append((shard, sample))
        return found

    def close(self) -> None:
        """Stop the readers."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self, slots: np.ndarray) -> _Plan:
        slots = np.asarray(slots, dtype=np.int64)
        _, shards, samples = self.order.locate(slots)
        places = list(zip(shards.tolist(), samples.tolist(), strict=True))
        return _Plan(slots, places, sum(int(self.shard_set.record(*place)["length"]) for place in places))

    def _start(self, plan: _Plan) -> _Pending:
        wanted = [(slot, *place) for slot, place in zip(plan.slots.tolist(), plan.places, strict=True)]
        parts = range(0, len(wanted), _SAMPLES_PER_TASK)
        return plan, [self._pool.submit(self._read, wanted[at : at + _SAMPLES_PER_TASK]) for at in parts]

    def _read(self, wanted: list[tuple[int, int, int]]) -> list[_Image]:
        images = []
        for slot, shard, sample in wanted:
            if self.quarantine is not None:
                self.quarantine.count_slot()
            images.append(self._image(slot, shard, sample))
        return images

    def _image(self, slot: int, shard: int, sample: int) -> _Image:
        """What stands at a slot: the image that the order says or, where that is unusable, a substitute."""
        quarantine = self.quarantine
        if quarantine is None:
            return _Image(shard, sample, self._usable_record(shard, sample), self.shard_set.read(shard, sample))
        for attempt in range(MAX_IN_A_ROW):
            if not quarantine.holds(slot, self.shard_set.name(shard), sample):
                try:
                    record = self._usable_record(shard, sample)
                    return _Image(shard, sample, record, self.shard_set.read(shard, sample))
                except SampleError as error:
                    quarantine.add(slot, error, "read")
            shard, sample = self.order.substitute(slot, attempt)
        raise ShardError(
            f"{MAX_IN_A_ROW} images in a row cannot be used, the last in shard {self.shard_set.name(shard)}; "
            "check the set with streamtrain verify"
        )

    def _usable_record(self, shard: int, sample: int) -> np.void:
        """The record of an image.

        Raises:
            SampleError: the index itself says that the image is unusable.
        """
        record = self.shard_set.record(shard, sample)
        width, height = int(record["width"]), int(record["height"])
        if record["flags"] & UNREADABLE:
            reason = "its header could not be read when it was indexed"
        elif self.max_pixels is not None and width * height > self.max_pixels:
            reason = f"{width}x{height} is more than {self.max_pixels} pixels"
        else:
            return record
        raise SampleError(self.shard_set.name(shard), sample, self.shard_set.key(shard, sample), reason)

    def _finish(self, pending: _Pending) -> Samples:
        """Wait for a batch and put it together."""
        plan, parts = pending
        images = [image for part in parts for image in part.result()]
        records = np.array([image.record for image in images], dtype=RECORD)
        return Samples(
            slots=plan.slots,
            payloads=[np.frombuffer(image.payload, dtype=np.uint8) for image in images],
            sizes=np.stack([records["width"], records["height"]], axis=1).astype(np.int32),
            labels=records["label"].astype(np.int32),
            shards=np.array([image.shard for image in images], dtype=np.int64),
            samples=np.array([image.sample for image in images], dtype=np.int64),
        )
