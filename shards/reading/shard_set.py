"""Random access to the images of a shard set: one read per image, verified against its CRC-32."""

from __future__ import annotations

import copy
import logging
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from shards.errors import SampleError, ShardError, SourceUnreachable, explain_os_error, printable, read_remedy
from shards.format import images
from shards.format.pixels import PixelFormat
from shards.format.records import (
    RECORD,
    DamagedIndexError,
    Index,
    find_record_fault,
    sealed_bytes,
)
from shards.format.set_manifest import SetManifest, ShardEntry
from shards.format.tar_members import NO_LABEL, split_suffix
from shards.reading.index_files import fetch_index, open_local_index
from shards.reading.local_files import LocalFile
from shards.storage.store import MAX_DOCUMENT_BYTES, RetryPolicy, Store, Traffic, is_url

DAMAGED_LABEL = -2

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_MAX_OPEN_SHARDS = 10_000  # of a local set; each takes about a kilobyte, and its files may be closed
_WRONG_HEADER = "the header before it in the tar is damaged, or of another member"
_MAX_INDEX_BYTES = 512 << 20  # memory for the indexes of a remote set


class RemoteTar:
    """A tar in a store, read by byte span without a local copy. Thread-safe."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    @property
    def url(self) -> str:
        return self.store.url_of(self.name)

    def read(self, length: int, offset: int) -> bytes:
        """Return bytes of the tar; retries as the store does.

        Raises:
            ShardError: the tar is missing or unreachable. Unlike a damaged image, this must stop the reader, which
                would otherwise replace every image of the shard.
        """
        return self.store.read(self.name, offset, offset + length)


class OpenShard(Protocol):
    """The index and the tar of a shard, open for reading."""

    @property
    def index(self) -> Index:
        """The records; raises ShardError or OSError if the index of a copy is damaged."""

    def read(self, length: int, offset: int) -> bytes:
        """Return bytes of the tar, fewer at its end; raises OSError if it cannot be read."""


@dataclass(frozen=True)
class _OriginalShard:
    """An ``OpenShard`` that is not a cached copy."""

    index: Index
    read: Callable[[int, int], bytes]


@dataclass(frozen=True)
class RemoteShard:
    """A shard in a store, with everything needed to copy it."""

    entry: ShardEntry
    tar: RemoteTar
    load_index: Callable[[], Index]


class ShardCopies(Protocol):
    """Local copies of remote shards, such as a ``ShardCache``."""

    def get(self, shard: int) -> OpenShard | None:
        """Return the copy of a shard; None to read the original."""

    def discard(self, shard: int) -> None:
        """Drop the damaged copy of a shard."""


class ShardSet:
    """A shard set on a local or mounted disk, or below a URL and read by byte span. Safe to share between threads.

    Attributes:
        path: the set's folder; the empty path for a remote set.
        traffic: counter of the bytes received over the network.
    """

    def __init__(
        self, path: Path, manifest: SetManifest, policy: RetryPolicy | None = None, store: Store | None = None
    ) -> None:
        self.path, self.manifest = path, manifest
        self.num_samples, self.num_shards = manifest.num_samples, len(manifest.shards)
        self.traffic = store.traffic if store is not None else Traffic()
        self._policy, self._store = policy, store
        self._stores: dict[str, Store] = {}  # of tars outside the set, by URL of the folder
        self._copies: ShardCopies | None = None
        self._first_copy = 0
        self._open: OrderedDict[int, _OriginalShard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | str, policy: RetryPolicy | None = None) -> ShardSet:
        """Open a set in a folder or at a URL; check that every local file exists with its full length.

        Raises:
            ShardError: the set is unfinished, or a file is missing or truncated; the message gives the remedy.
        """
        if is_url(str(path)):
            store = Store(str(path), policy)
            shard_set = cls(Path(), SetManifest.fetch(store), policy, store)
        else:
            shard_set = cls(Path(path), SetManifest.load(path), policy)
        for fault in shard_set.manifest.faults:
            logger.warning("manifest.json of %s: %s; check the set with streamtrain verify", path, printable(fault))
        if is_url(str(path)):
            return shard_set
        for shard, entry in enumerate(shard_set.manifest.shards):
            if is_url(entry.url):
                continue
            tar, index = shard_set.tar_path(shard), shard_set.index_path(shard)
            remedy = "copy the set again, or pack it again"
            try:
                tar_bytes, index_bytes = tar.stat().st_size, index.stat().st_size
            except OSError as error:
                is_missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
                fault = f"{'is missing' if is_missing else 'cannot be read'} ({explain_os_error(error)})"
                raise ShardError(f"{error.filename} {fault}; {read_remedy(error, remedy)}") from error
            if tar_bytes != entry.bytes:
                raise ShardError(f"shard {tar} has {tar_bytes} bytes instead of {entry.bytes}; {remedy}")
            if index_bytes < entry.samples * RECORD.itemsize:
                raise ShardError(f"index {index} is truncated; {remedy}")
        return shard_set

    @property
    def is_remote(self) -> bool:
        """Whether any of its tars is in a store."""
        return any(map(self._is_remote, self.manifest.shards))

    @property
    def sizes(self) -> np.ndarray:
        """Samples in each shard, int64 [num_shards], as ``Order`` takes them."""
        return np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)

    @property
    def digest(self) -> str:
        """Digest of the set, which a saved stream must match."""
        return self.manifest.digest

    @property
    def pixels(self) -> PixelFormat:
        """Channels and dtype of the images."""
        return self.manifest.pixels

    def tar_path(self, shard: int) -> Path:
        entry = self.manifest.shards[shard]
        return Path(entry.url) if entry.url else self.path / "shards" / entry.name

    def index_path(self, shard: int) -> Path:
        return self.path / "index" / self.manifest.shards[shard].index_name

    def name(self, shard: int) -> str:
        """Return the name of a shard for log messages."""
        return self.manifest.shards[shard].name

    def remote_shard(self, shard: int) -> RemoteShard | None:
        """Return a shard in a store; None for a shard on a local or mounted disk."""
        entry = self.manifest.shards[shard]
        tar = self._remote_tar(entry)
        return None if tar is None else RemoteShard(entry, tar, partial(self._load_index, entry))

    def with_copies(self, copies: ShardCopies, first_shard: int = 0) -> ShardSet:
        """Return a view of this set that reads local copies where they exist, numbered from ``first_shard``."""
        shard_set = copy.copy(self)
        shard_set._copies, shard_set._first_copy = copies, first_shard
        return shard_set

    def records(self, shard: int) -> np.ndarray:
        """Return the index records [num_samples of the shard] (``shards.format.records.RECORD``).

        Raises:
            ShardError: the index is missing or damaged.
        """
        return self._use(shard, lambda opened: opened.index.records())

    def record(self, shard: int, sample: int) -> np.void:
        """Return the index record of one sample.

        Raises:
            SampleError: the part of the index that holds the record is damaged.
            ShardError: the index is missing or damaged as a whole.
        """
        try:
            return self._use(shard, lambda opened: opened.index.record(sample))
        except DamagedIndexError as error:
            raise SampleError(self.name(shard), sample, "", str(error)) from error

    def labels(self, shard: int, samples: np.ndarray) -> np.ndarray:
        """Return the labels of samples of a shard, int64 [num_samples]; ``NO_LABEL`` without one.

        Labels that cannot be read, or that no image can have, are ``DAMAGED_LABEL``.

        Raises:
            ShardError: the index is missing or damaged as a whole.
        """

        def label(sample: int) -> int:
            try:
                return int(self.record(shard, sample)["label"])
            except SampleError:
                return DAMAGED_LABEL

        try:
            labels = self.records(shard)["label"][samples].astype(np.int64)
        except DamagedIndexError:
            labels = np.array([label(sample) for sample in samples.tolist()], np.int64)
        end = len(self.manifest.classes) or 2**31
        labels[(labels < NO_LABEL) | (labels >= end)] = DAMAGED_LABEL
        return labels

    def read(self, shard: int, sample: int) -> bytes:
        """Return the encoded bytes of one image, verified against its CRC-32.

        Raises:
            SampleError: the bytes are too few or differ from those packed, or the record is damaged; names shard, index
                and key.
            ShardError: the shard is missing or unreachable.
        """
        record = self._sound_record(shard, sample)
        return self._use(shard, lambda opened: self._read_verified(opened, record, shard, sample))

    def map_index(self, shard: int, kind: str) -> Index | None:
        """Open the index of a shard's maps of a kind, as ``record`` does; None if the shard has none."""
        is_any = kind in self.manifest.maps and self.manifest.maps[kind][shard] > 0
        return self._load_index(self.manifest.shards[shard], kind) if is_any else None

    def read_map(self, shard: int, sample: int, record: np.void) -> bytes:
        """Return the bytes of a map whose record is given; raises as ``read``."""
        num_bytes = self.manifest.shards[shard].bytes
        offset, length = int(record["offset"]), int(record["length"])
        if offset + length > num_bytes or length > images.MAX_BYTES:
            raise self._sample_error(shard, sample, f"its map's record is damaged: {length} bytes at offset {offset}")
        content = self._use(shard, lambda opened: self._read_exactly(opened, shard, sample, length, offset))
        if zlib.crc32(content) != int(record["crc32"]):
            raise self._sample_error(shard, sample, "its map differs from the packed one (wrong CRC-32)")
        return content

    def part_reader(self, shard: int, sample: int) -> Callable[[int, int], bytes]:
        """Return a function that reads the bytes [begin, end) of one image, which are not compared with its CRC-32.

        The function raises a SampleError if these bytes cannot be read, and a SourceUnreachable where ``read`` raises
        a ShardError.

        Raises:
            SampleError: the record is damaged.
            ShardError: the shard is missing or unreachable.
        """
        record = self._sound_record(shard, sample)
        offset, length = int(record["offset"]), int(record["length"])

        def is_sound(opened: OpenShard) -> bool:
            block = tarfile.BLOCKSIZE
            return opened.index.has_checksums or _is_header_of(
                self._read_exactly(opened, shard, sample, block, offset - block), length
            )

        if not self._use(shard, is_sound):
            raise self._sample_error(shard, sample, _WRONG_HEADER)

        def read_part(begin: int, end: int) -> bytes:
            num_bytes = max(0, min(end, length) - begin)
            try:
                return self._use(shard, lambda each: self._read_exactly(each, shard, sample, num_bytes, offset + begin))
            except SampleError:
                raise
            except ShardError as error:
                raise SourceUnreachable(str(error)) from error

        return read_part

    def _sound_record(self, shard: int, sample: int) -> np.void:
        record = self.record(shard, sample)
        fault = find_record_fault(record, self.manifest.shards[shard].bytes, len(self.manifest.classes))
        if fault is not None:
            raise self._sample_error(shard, sample, f"its index record is damaged: {fault}")
        return record

    def key(self, shard: int, sample: int) -> str:
        """Return the WebDataset key of a sample, read from the tar; empty if its header is damaged."""
        try:
            offset = int(self.record(shard, sample)["offset"])
            header = self._use(shard, lambda opened: opened.read(tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE))
            return split_suffix(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]
        except (tarfile.TarError, OSError, ValueError, OverflowError):
            return ""

    def _use(self, shard: int, function: Callable[[OpenShard], Result]) -> Result:
        """Return ``function`` of a shard: of its cached copy, or of the original if there is none or it is damaged."""
        number = self._first_copy + shard
        copied = self._copies.get(number) if self._copies is not None else None
        if self._copies is None or copied is None:
            try:
                return function(self._original(shard))
            except SampleError as error:
                if self.remote_shard(shard) is None:
                    raise
                # the network may have changed the bytes
                logger.warning("%s; reading it again", error)
            return function(self._original(shard))
        try:
            return function(copied)
        except (ShardError, OSError) as error:
            logger.warning("%s; dropping the cached copy and reading the original", printable(error))
        # outside the handler, because the error's traceback holds a reference to the copy
        copied = None
        self._copies.discard(number)
        return function(self._original(shard))

    def _read_verified(self, opened: OpenShard, record: np.void, shard: int, sample: int) -> bytes:
        length, offset = int(record["length"]), int(record["offset"])
        # an index without checksums is compared with the header that precedes the image in the tar
        header_bytes = 0 if opened.index.has_checksums else tarfile.BLOCKSIZE
        if offset < header_bytes:
            raise self._sample_error(shard, sample, f"its index record is damaged: offset {offset}")
        content = self._read_exactly(opened, shard, sample, header_bytes + length, offset - header_bytes)
        payload = content[header_bytes:] if header_bytes else content
        if zlib.crc32(payload) != int(record["crc32"]):
            raise self._sample_error(shard, sample, "differs from the packed image (wrong CRC-32)")
        if header_bytes and not _is_header_of(content[:header_bytes], length):
            raise self._sample_error(shard, sample, _WRONG_HEADER)
        return payload

    def _read_exactly(self, opened: OpenShard, shard: int, sample: int, length: int, offset: int) -> bytes:
        """Return ``length`` bytes of a tar from ``offset`` on, which belong to one image; raises as ``read``."""
        try:
            content = opened.read(length, offset)
        except FileNotFoundError as error:  # the whole shard is missing, not one image
            raise ShardError(f"shard {self.tar_path(shard)} is gone; restore it and re-run to resume") from error
        except OSError as error:
            raise self._sample_error(shard, sample, f"cannot be read ({explain_os_error(error)})") from error
        if len(content) != length:
            raise self._sample_error(shard, sample, f"has {len(content)} bytes instead of {length}")
        return content

    def _sample_error(self, shard: int, sample: int, reason: str) -> SampleError:
        return SampleError(self.name(shard), sample, self.key(shard, sample), reason)

    def _original(self, shard: int) -> OpenShard:
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
        entry = self.manifest.shards[shard]
        tar = self._remote_tar(entry) or LocalFile(self.tar_path(shard))
        opened = _OriginalShard(self._load_index(entry), tar.read)
        with self._lock:
            self._open[shard] = opened
            while self._is_over_limit():
                self._open.popitem(last=False)
        return opened

    def _is_over_limit(self) -> bool:
        if self._store is None:
            return len(self._open) > _MAX_OPEN_SHARDS
        return sum(len(opened.index) for opened in self._open.values()) * RECORD.itemsize > _MAX_INDEX_BYTES

    def _remote_tar(self, entry: ShardEntry) -> RemoteTar | None:
        if not self._is_remote(entry):
            return None
        if entry.url:
            folder, _, name = entry.url.rpartition("/")
            with self._lock:
                if folder not in self._stores:
                    self._stores[folder] = Store(folder, self._policy, self.traffic)
                return RemoteTar(self._stores[folder], name)
        assert self._store is not None
        return RemoteTar(self._store, f"shards/{entry.name}")

    def _is_remote(self, entry: ShardEntry) -> bool:
        return is_url(entry.url) if entry.url else self._store is not None

    def _load_index(self, entry: ShardEntry, kind: str = "") -> Index:
        """Open the index of a shard or its maps; raises a ShardError if it is missing, damaged or of another shard."""
        name = entry.map_index_name(kind) if kind else entry.index_name
        if self._store is None:
            index = open_local_index(self.path / "index" / name)
        else:
            max_bytes = min(MAX_DOCUMENT_BYTES + sealed_bytes(entry.samples), _MAX_INDEX_BYTES)
            index = fetch_index(self._store, f"index/{name}", max_bytes)
        if len(index) != entry.samples:
            counts = f"{len(index)} samples, the manifest says {entry.samples}"
            raise ShardError(f"index {name} has {counts}; copy the set again, or pack it again")
        return index


def _is_header_of(header: bytes, length: int) -> bool:
    """Return whether a block is the valid tar header of a member of ``length`` bytes."""
    try:
        size = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except (tarfile.TarError, ValueError, OverflowError):
        return False
    return size in (length, 0)  # 0 where an extended header states the size
