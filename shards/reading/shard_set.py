"""Random access to the images of a shard set: one read per image, verified against its CRC-32."""

from __future__ import annotations

import copy
import logging
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from shards.errors import SampleError, ShardError
from shards.format import images
from shards.format.index import RECORD, load_index, parse_index, split_name
from shards.format.set_manifest import SetManifest, ShardEntry
from shards.storage.store import MAX_DOCUMENT_BYTES, RetryPolicy, Store, Traffic, is_url

logger = logging.getLogger(__name__)
_MAX_OPEN_SHARDS = 200  # of a local set, with two open files each; the usual limit is 1024
_MAX_INDEX_BYTES = 512 << 20  # memory for the indexes of a remote set


class LocalTar:
    """A tar on a local or mounted disk; opened on the first read, closed with its last reference. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._lock = threading.Lock()

    def read(self, length: int, offset: int) -> bytes:
        """Return bytes of the tar, fewer at its end; raises OSError if it cannot be read."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return os.pread(self._descriptor, length, offset)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


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

    def records(self) -> np.ndarray:
        """Return the index records [num_samples of the shard] (``shards.format.index.RECORD``)."""

    def record(self, sample: int) -> np.void:
        """Return the index record of one sample."""

    def read(self, length: int, offset: int) -> bytes:
        """Return bytes of the tar, fewer at its end; raises OSError if it cannot be read."""


class _OriginalShard:
    """An ``OpenShard`` that is not a cached copy."""

    def __init__(self, records: np.ndarray, tar: LocalTar | RemoteTar) -> None:
        self._records, self.read = records, tar.read

    def records(self) -> np.ndarray:
        return self._records

    def record(self, sample: int) -> np.void:
        return self._records[sample]


@dataclass(frozen=True)
class RemoteShard:
    """A shard in a store, with everything needed to copy it."""

    entry: ShardEntry
    tar: RemoteTar
    load_records: Callable[[], np.ndarray]


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
            return cls(Path(), SetManifest.fetch(store), policy, store)
        path = Path(path)
        shard_set = cls(path, SetManifest.load(path), policy)
        for shard, entry in enumerate(shard_set.manifest.shards):
            if is_url(entry.url):
                continue
            tar, index = shard_set.tar_path(shard), shard_set.index_path(shard)
            remedy = "copy the set again, or pack it again"
            try:
                tar_bytes, index_bytes = tar.stat().st_size, index.stat().st_size
            except OSError as error:
                raise ShardError(f"{error.filename} is missing ({error.strerror}); {remedy}") from error
            if tar_bytes != entry.bytes:
                raise ShardError(f"shard {tar} has {tar_bytes} bytes instead of {entry.bytes}; {remedy}")
            if index_bytes < entry.samples:
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
        return None if tar is None else RemoteShard(entry, tar, partial(self._load_records, entry))

    def with_copies(self, copies: ShardCopies, first_shard: int = 0) -> ShardSet:
        """Return a view of this set that reads local copies where they exist, numbered from ``first_shard``."""
        shard_set = copy.copy(self)
        shard_set._copies, shard_set._first_copy = copies, first_shard
        return shard_set

    def records(self, shard: int) -> np.ndarray:
        """Return the index records [num_samples of the shard] (``shards.format.index.RECORD``)."""
        return self._shard(shard).records()

    def record(self, shard: int, sample: int) -> np.void:
        return self._shard(shard).record(sample)

    def read(self, shard: int, sample: int) -> bytes:
        """Return the encoded bytes of one image, verified against its CRC-32.

        Raises:
            SampleError: the bytes are too few or differ from those packed; names shard, index and key.
            ShardError: the shard is missing or unreachable.
        """
        try:
            return self._read_verified(self._shard(shard), shard, sample)
        except SampleError as error:
            if self.remote_shard(shard) is None:
                raise
            source = "reading it again" if self._copies is None else "dropping the cached copy and reading the original"
            logger.warning("%s; %s", str(error), source)
        # outside the handler: the error's traceback holds the last reference to the copy
        if self._copies is not None:
            self._copies.discard(self._first_copy + shard)
        return self._read_verified(self._original(shard), shard, sample)

    def key(self, shard: int, sample: int) -> str:
        """Return the WebDataset key of a sample, read from the tar; empty if its header is damaged."""
        opened = self._shard(shard)
        try:
            header = opened.read(tarfile.BLOCKSIZE, int(opened.record(sample)["offset"]) - tarfile.BLOCKSIZE)
            return split_name(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]
        except (tarfile.TarError, OSError, ValueError, OverflowError):
            return ""

    def _read_verified(self, opened: OpenShard, shard: int, sample: int) -> bytes:
        record = opened.record(sample)
        length, offset = int(record["length"]), int(record["offset"])
        if length > images.MAX_BYTES or offset + length > self.manifest.shards[shard].bytes:
            raise self._sample_error(shard, sample, f"its index is damaged: {length} bytes at offset {offset}")
        try:
            payload = opened.read(length, offset)
        except FileNotFoundError as error:  # the whole shard is missing, not one image
            raise ShardError(f"shard {self.tar_path(shard)} is gone; restore it and re-run to resume") from error
        except OSError as error:
            raise self._sample_error(shard, sample, f"cannot be read ({error.strerror})") from error
        if len(payload) != length:
            raise self._sample_error(shard, sample, f"has {len(payload)} bytes instead of {length}")
        if zlib.crc32(payload) != int(record["crc32"]):
            raise self._sample_error(shard, sample, "differs from the packed image (wrong CRC-32)")
        return payload

    def _sample_error(self, shard: int, sample: int, reason: str) -> SampleError:
        return SampleError(self.manifest.shards[shard].name, sample, self.key(shard, sample), reason)

    def _shard(self, shard: int) -> OpenShard:
        copied = self._copies.get(self._first_copy + shard) if self._copies is not None else None
        return self._original(shard) if copied is None else copied

    def _original(self, shard: int) -> OpenShard:
        with self._lock:
            opened = self._open.get(shard)
            if opened is not None:
                self._open.move_to_end(shard)
                return opened
        entry = self.manifest.shards[shard]
        tar = self._remote_tar(entry) or LocalTar(self.tar_path(shard))
        opened = _OriginalShard(self._load_records(entry), tar)
        with self._lock:
            self._open[shard] = opened
            while self._is_over_limit():
                self._open.popitem(last=False)
        return opened

    def _is_over_limit(self) -> bool:
        if self._store is None:
            return len(self._open) > _MAX_OPEN_SHARDS
        return sum(opened.records().nbytes for opened in self._open.values()) > _MAX_INDEX_BYTES

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

    def _load_records(self, entry: ShardEntry) -> np.ndarray:
        """Return the index of a shard; raises a ShardError if it is missing, damaged or of another shard."""
        if self._store is None:
            records = load_index(self.path / "index" / entry.index_name).view(np.ndarray)
        else:
            index = f"index/{entry.index_name}"
            max_bytes = min(MAX_DOCUMENT_BYTES + entry.samples * RECORD.itemsize, _MAX_INDEX_BYTES)
            records = self._store.load(index, partial(parse_index, name=self._store.url_of(index)), max_bytes)
        if len(records) != entry.samples:
            counts = f"{len(records)} samples, the manifest says {entry.samples}"
            raise ShardError(f"index {entry.index_name} has {counts}; copy the set again, or pack it again")
        return records
