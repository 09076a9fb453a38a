"""Reading the images of slots: threads that read ahead of the consumer, in order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shards.errors import SampleError, ShardError, SourceUnreachable
from shards.format import images
from shards.format.records import RECORD, UNREADABLE
from shards.format.windows import open_tiff
from shards.reading.mixture import AnyOrder, AnySet
from shards.reading.quarantine import MAX_SUBSTITUTES, Quarantine
from shards.reading.random_window import RandomWindow

_SAMPLES_PER_TASK = 8
BATCHES_AHEAD = 16


@dataclass(frozen=True)
class Samples:
    """The encoded images of B slots, and the decoded windows of large TIFFs, whose encoded images are empty."""

    slots: np.ndarray  # int64 [B]
    payloads: list[np.ndarray]  # B arrays uint8 [num_bytes]
    windows: dict[int, np.ndarray]  # by row: [height, width, channels]
    sizes: np.ndarray  # int32 [B, 2]: width, height in pixels, EXIF orientation applied
    labels: np.ndarray  # int32 [B]: -1 for no label
    shards: np.ndarray  # int64 [B]
    samples: np.ndarray  # int64 [B]


@dataclass(frozen=True)
class _Plan:
    slots: np.ndarray
    reads: list[tuple[int, int, int]]  # slot, shard, sample
    num_bytes: int


@dataclass(frozen=True)
class _Image:
    shard: int
    sample: int
    record: np.void
    payload: bytes = b""
    window: np.ndarray | None = None


_Pending = tuple[_Plan, list[Future[list[_Image]]]]


class Source:
    """Reads the images of slots with several threads, ahead of the consumer, in order, in bounded memory.

    Args:
        threads: number of reader threads, which wait for the disk and compute checksums.
        max_bytes_in_flight: limit on the encoded images held ahead of the consumer. A batch larger than the limit is
            read alone.
        quarantine: log of unusable images, which are replaced by others that depend only on the slot; without it, an
            unusable image is an error.
        max_pixels: images with more pixels are unusable.
        window: draws a window of each larger image. Of a TIFF, only the tiles or strips that it touches are read and
            decoded, where possible. ``max_pixels`` then limits each of them, and the CRC-32 is not checked.
        on_read: called after each batch with the slot that follows its last one; slots must ascend.
    """

    def __init__(
        self,
        shard_set: AnySet,
        order: AnyOrder,
        *,
        threads: int = 4,
        max_bytes_in_flight: int = 256 << 20,
        quarantine: Quarantine | None = None,
        max_pixels: int | None = None,
        window: RandomWindow | None = None,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        self.shard_set, self.order, self.max_bytes_in_flight = shard_set, order, max_bytes_in_flight
        self.quarantine, self.max_pixels, self.window = quarantine, max_pixels, window
        # by shard: whether all large images so far were read by window, which the index cannot say
        self._reads_windows: dict[int, bool] = {}
        self._on_read = on_read
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-reader")

    def batches(self, slot_lists: Iterable[np.ndarray]) -> Iterator[Samples]:
        """Yield the images of each list of slots (int64 [B]), in the order of the lists.

        Raises:
            SampleError: an image is unusable and there is no quarantine.
            ShardError: an index cannot be read, or too many images are unusable.
        """
        plans = map(self._plan, slot_lists)
        following = next(plans, None)
        pending: deque[_Pending] = deque()
        bytes_ahead = 0
        try:
            while following is not None or pending:
                while following is not None and len(pending) < BATCHES_AHEAD:
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

    def replace(self, batch: Samples, row: int, reason: str) -> Samples:
        """Return the batch with the image in ``row``, which does not decode, replaced. Raises as ``batches``.

        Args:
            reason: the decoder's error, for the log.
        """
        slot, shard, sample = int(batch.slots[row]), int(batch.shards[row]), int(batch.samples[row])
        error = SampleError(self.shard_set.name(shard), sample, self.shard_set.key(shard, sample), reason)
        if self.quarantine is None:
            raise error
        self.quarantine.add(slot, error, "decode")
        image = self._image(slot, shard, sample)
        payloads = list(batch.payloads)
        payloads[row] = np.frombuffer(image.payload, dtype=np.uint8)
        windows = {each: values for each, values in batch.windows.items() if each != row}
        if image.window is not None:
            windows[row] = image.window
        sizes, labels, shards, samples = (
            column.copy() for column in (batch.sizes, batch.labels, batch.shards, batch.samples)
        )
        sizes[row] = image.record["width"], image.record["height"]
        labels[row], shards[row], samples[row] = image.record["label"], image.shard, image.sample
        return Samples(batch.slots, payloads, windows, sizes, labels, shards, samples)

    def locate(self, slots: np.ndarray) -> list[tuple[int, int]]:
        """Return (shard, sample) of the images at slots (int64 [B]), with known unusable ones replaced."""
        shards, samples = self.order.locate(slots)
        located = []
        for slot, shard, sample in zip(slots.tolist(), shards.tolist(), samples.tolist(), strict=True):
            for attempt in range(MAX_SUBSTITUTES):
                if self.quarantine is None or not self.quarantine.is_unusable(slot, self.shard_set.name(shard), sample):
                    break
                shard, sample = self.order.substitute(slot, attempt)
            located.append((shard, sample))
        return located

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.quarantine is not None:
            self.quarantine.close()

    def _plan(self, slots: np.ndarray) -> _Plan:
        slots = np.asarray(slots, dtype=np.int64)
        shards, samples = self.order.locate(slots)
        reads = list(zip(slots.tolist(), shards.tolist(), samples.tolist(), strict=True))
        return _Plan(slots, reads, sum(self._length(shard, sample) for _, shard, sample in reads))

    def _length(self, shard: int, sample: int) -> int:
        try:
            record = self.shard_set.record(shard, sample)
        except SampleError:
            return 0  # quarantined when it is read
        window = self.window
        if window is not None and self._reads_windows.get(shard) and window.applies_to(*_size(record)):
            return window.side**2 * self.shard_set.pixels.num_bytes
        return min(int(record["length"]), images.MAX_BYTES)

    def _start(self, plan: _Plan) -> _Pending:
        starts = range(0, len(plan.reads), _SAMPLES_PER_TASK)
        return plan, [self._pool.submit(self._read, plan.reads[start : start + _SAMPLES_PER_TASK]) for start in starts]

    def _read(self, reads: list[tuple[int, int, int]]) -> list[_Image]:
        found = []
        for slot, shard, sample in reads:
            if self.quarantine is not None:
                self.quarantine.count_slot()
            found.append(self._image(slot, shard, sample))
        return found

    def _image(self, slot: int, shard: int, sample: int) -> _Image:
        """Read the image of a slot, or a substitute if it is unusable."""
        quarantine = self.quarantine
        if quarantine is None:
            return self._usable_image(slot, shard, sample)
        for attempt in range(MAX_SUBSTITUTES):
            if not quarantine.is_unusable(slot, self.shard_set.name(shard), sample):
                try:
                    return self._usable_image(slot, shard, sample)
                except SampleError as error:
                    quarantine.add(slot, error, "read")
            shard, sample = self.order.substitute(slot, attempt)
        raise ShardError(
            f"{MAX_SUBSTITUTES} images in a row are unusable, the last in shard {self.shard_set.name(shard)}; "
            "check the set with streamtrain verify"
        )

    def _usable_image(self, slot: int, shard: int, sample: int) -> _Image:
        """Read an image, or its window at ``slot``.

        Raises:
            SampleError: the image is unusable: according to its record, when it is read, or because they disagree.
        """
        record = self.shard_set.record(shard, sample)
        width, height = _size(record)
        if record["flags"] & UNREADABLE:
            raise self._unusable(shard, sample, "its header could not be read during indexing")
        if self.window is not None and self.window.applies_to(width, height):
            values = self._read_window(self.window, slot, shard, sample, (width, height))
            self._reads_windows[shard] = self._reads_windows.get(shard, True) and values is not None
            if values is not None:
                return _Image(shard, sample, record, window=values)
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise self._unusable(shard, sample, f"{width}x{height} is more than {self.max_pixels} pixels")
        payload = self.shard_set.read(shard, sample)
        # the crops are drawn for the size in the record, so a wrong size would fail later, at every start
        try:
            size = images.read_size(payload, self.shard_set.pixels)
        except ShardError:
            size = width, height  # left to the decoder, whose errors exclude the image at every slot
        if size == (height, width):
            # an earlier version stored the size without an orientation that is applied now
            record = record.copy()
            record["width"], record["height"] = size
        elif size != (width, height):
            raise self._unusable(shard, sample, _describe_sizes((width, height), size))
        return _Image(shard, sample, record, payload)

    def _read_window(
        self, window: RandomWindow, slot: int, shard: int, sample: int, stated: tuple[int, int]
    ) -> np.ndarray | None:
        """Return the window of a TIFF, [height, width, channels]; None for images that must be decoded whole.

        Args:
            stated: width and height in the index.

        Raises:
            SampleError: the image is unusable.
            ShardError: the shard is missing or unreachable.
        """
        num_bytes = int(self.shard_set.record(shard, sample)["length"])
        read = self.shard_set.part_reader(shard, sample)
        try:
            image = open_tiff(num_bytes, read, self.shard_set.pixels, self.max_pixels)
            if image is None:
                return None
            size = image.width, image.height
            if size not in (stated, stated[::-1]):
                raise ShardError(_describe_sizes(stated, size))
            return image.read(*window.draw(slot, *size))
        except SourceUnreachable:
            raise
        except ShardError as error:
            reason = error.reason if isinstance(error, SampleError) else str(error)
            raise self._unusable(shard, sample, reason) from error

    def _unusable(self, shard: int, sample: int, reason: str) -> SampleError:
        return SampleError(self.shard_set.name(shard), sample, self.shard_set.key(shard, sample), reason)

    def _finish(self, pending: _Pending) -> Samples:
        plan, parts = pending
        found = [image for part in parts for image in part.result()]
        records = np.array([image.record for image in found], dtype=RECORD)
        return Samples(
            slots=plan.slots,
            payloads=[np.frombuffer(image.payload, dtype=np.uint8) for image in found],
            windows={row: image.window for row, image in enumerate(found) if image.window is not None},
            sizes=np.stack([records["width"], records["height"]], axis=1).astype(np.int32),
            labels=records["label"].astype(np.int32),
            shards=np.array([image.shard for image in found], dtype=np.int64),
            samples=np.array([image.sample for image in found], dtype=np.int64),
        )


def _size(record: np.void) -> tuple[int, int]:
    return int(record["width"]), int(record["height"])


def _describe_sizes(stated: tuple[int, int], found: tuple[int, int]) -> str:
    return f"the index has {stated[0]}x{stated[1]} pixels, the image's header {found[0]}x{found[1]}"
