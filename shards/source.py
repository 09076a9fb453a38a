"""From slots to the bytes of images: a shard set on disk, and threads that read ahead of the consumer."""

from __future__ import annotations

import os
import tarfile
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.errors import SampleError, ShardError
from shards.index import RECORD, load_index, split_name
from shards.manifest import Manifest
from shards.order import Order

_OPEN_SHARDS = 200  # each takes two open files; the usual limit is 1024
_SAMPLES_PER_TASK = 8
_BATCHES_AHEAD = 16


class _OpenShard:
    """An open tar and its mapped index; closed when the last reader lets go of it."""

    def __init__(self, tar: Path, index: Path) -> None:
        self.records = load_index(index).view(np.ndarray)
        try:
            self.file = os.open(tar, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ShardError(f"shard {tar} cannot be opened ({error.strerror}); copy the set again") from error

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


class ShardSet:
    """A shard set on a local or mounted disk. Safe to share between threads.

    Attributes:
        path: the set's folder.
        manifest: its description.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str) -> ShardSet:
        """Open a set, and check that every file is there with its full length.

        Raises:
            ShardError: no set, not finished, or a file missing or cut short; one line that says what to do.
        """
        path = Path(path)
        shard_set = cls(path, Manifest.load(path))
        for shard, entry in enumerate(shard_set.manifest.shards):
            tar, index = shard_set.tar_path(shard), shard_set.index_path(shard)
            try:
                tar_bytes, index_bytes = tar.stat().st_size, index.stat().st_size
            except OSError as error:
                raise ShardError(
                    f"{error.filename} is missing ({error.strerror}); copy the set again, or pack it again"
                ) from error
            if tar_bytes != entry.bytes:
                raise ShardError(
                    f"shard {tar} has {tar_bytes} bytes instead of {entry.bytes}; copy the set again, or pack it again"
                )
            if index_bytes < entry.samples:
                raise ShardError(f"index {index} is cut short; copy the set again, or pack it again")
        return shard_set

    @property
    def num_samples(self) -> int:
        """Images in the set."""
        return self.manifest.num_samples

    @property
    def sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [num_shards]: what ``Order`` needs."""
        return np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty where the set has no labels."""
        return self.manifest.classes

    @property
    def digest(self) -> str:
        """What a saved stream must agree with."""
        return self.manifest.digest

    def tar_path(self, shard: int) -> Path:
        """The tar of a shard."""
        return self.path / "shards" / self.manifest.shards[shard].name

    def index_path(self, shard: int) -> Path:
        """Our index of a shard."""
        return self.path / "index" / (self.manifest.shards[shard].name.removesuffix(".tar") + ".npy")

    def records(self, shard: int) -> np.ndarray:
        """The index records [num_samples of the shard] (``shards.index.RECORD``)."""
        return self._shard(shard).records

    def record(self, shard: int, sample: int) -> np.void:
        """The index record of one sample."""
        return self._shard(shard).records[sample]

    def read(self, shard: int, sample: int) -> bytes:
        """The bytes of one image, checked against its CRC-32.

        Raises:
            SampleError: short, or not what was packed; names shard, index and key.
        """
        opened = self._shard(shard)
        record = opened.records[sample]
        length, offset = int(record["length"]), int(record["offset"])
        try:
            payload = os.pread(opened.file, length, offset)
        except OSError as error:
            raise self._sample_error(shard, sample, f"cannot be read ({error.strerror})") from error
        if len(payload) != length:
            raise self._sample_error(shard, sample, f"has {len(payload)} bytes instead of {length}")
        if zlib.crc32(payload) != int(record["crc32"]):
            raise self._sample_error(shard, sample, "was changed since it was packed (its CRC-32 differs)")
        return payload

    def key(self, shard: int, sample: int) -> str:
        """The WebDataset key of a sample, read from the tar; empty where that is damaged too."""
        opened = self._shard(shard)
        header = os.pread(opened.file, tarfile.BLOCKSIZE, int(opened.records[sample]["offset"]) - tarfile.BLOCKSIZE)
        try:
            return split_name(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]
        except tarfile.TarError:
            return ""

    def _sample_error(self, shard: int, sample: int, reason: str) -> SampleError:
        return SampleError(self.manifest.shards[shard].name, sample, self.key(shard, sample), reason)

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
        opened = _OpenShard(self.tar_path(shard), self.index_path(shard))
        if len(opened.records) != self.manifest.shards[shard].samples:
            raise ShardError(
                f"index {self.index_path(shard)} holds {len(opened.records)} samples, the manifest says "
                f"{self.manifest.shards[shard].samples}; copy the set again, or pack it again"
            )
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened


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
    """

    def __init__(
        self, shard_set: ShardSet, order: Order, *, threads: int = 4, max_bytes_in_flight: int = 256 << 20
    ) -> None:
        self.shard_set, self.order, self.max_bytes_in_flight = shard_set, order, max_bytes_in_flight
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shard-reader")

    def batches(self, slot_lists: Iterable[np.ndarray]) -> Iterator[Samples]:
        """The images of each list of slots (int64 [B]), in the order of the lists.

        Raises:
            SampleError: an image is not what was packed.
            ShardError: a shard cannot be opened.
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
                batch = _finish(pending[0])
                bytes_ahead -= pending.popleft()[0].num_bytes
                yield batch
        finally:
            for _, parts in pending:
                for part in parts:
                    part.cancel()

    def fetch(self, slots: np.ndarray) -> Samples:
        """The images of one list of slots (int64 [B]), read now. Raises as ``batches`` does."""
        return _finish(self._start(self._plan(slots)))

    def close(self) -> None:
        """Stop the readers."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _plan(self, slots: np.ndarray) -> _Plan:
        slots = np.asarray(slots, dtype=np.int64)
        _, shards, samples = self.order.locate(slots)
        places = list(zip(shards.tolist(), samples.tolist(), strict=True))
        return _Plan(slots, places, sum(int(self.shard_set.record(*place)["length"]) for place in places))

    def _start(self, plan: _Plan) -> _Pending:
        parts = range(0, len(plan.places), _SAMPLES_PER_TASK)
        return plan, [self._pool.submit(self._read, plan.places[at : at + _SAMPLES_PER_TASK]) for at in parts]

    def _read(self, places: list[tuple[int, int]]) -> list[_Image]:
        read, record = self.shard_set.read, self.shard_set.record
        return [_Image(shard, sample, record(shard, sample), read(shard, sample)) for shard, sample in places]


def _finish(pending: _Pending) -> Samples:
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
