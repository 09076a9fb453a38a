"""Local copies of remote shards, prefetched into a folder of bounded size.

The order alone determines which shards a process reads and when (``shards.reading.order.Window``). Threads fetch the
shards in that order, each into one file with its index appended, as far ahead as the folder's size limit allows
(``shards.reading.ledger``). A reader waits for a shard that is being fetched. It reads the original when the folder has
no space, because all cached shards are in use or needed sooner, and for shards outside the order. So no reader waits
for space, and processes that share a folder cannot block each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from shards.errors import ShardError, explain_os_error
from shards.format.records import RECORD, Index, sealed_bytes
from shards.format.set_manifest import ShardEntry
from shards.reading.ledger import USE_BYTES, Ledger, Refusal, Reservation
from shards.reading.local_files import max_open_files, with_descriptors
from shards.reading.order import Window
from shards.reading.shard_set import RemoteShard
from shards.storage.store import DownloadStopped

_VERSION = 2  # of the copies: with the checksums of the index
_BUSY_SECONDS = 0.2  # until a shard that another process fetches is checked again
_FULL_SECONDS = 1.0  # until the next attempt to find room
_PUBLISH_SECONDS = 5.0  # between two updates for the other processes
_JOIN_SECONDS = 2.0

logger = logging.getLogger(__name__)


def copy_bytes(entry: ShardEntry) -> int:
    """Return the length in bytes of a shard's copy: the tar with its index appended."""
    return entry.bytes + sealed_bytes(entry.samples)


def min_cache_bytes(entries: Sequence[ShardEntry], num_shards: int, processes: int) -> int:
    """Return the smallest cache limit, in bytes, that fits any ``num_shards`` of the shards for ``processes``."""
    largest = sorted(map(copy_bytes, entries), reverse=True)[:num_shards]
    return sum(largest) + processes * USE_BYTES * (len(largest) + 1)


class CachedShard:
    """A copy of a shard (an ``OpenShard``), which stays in the cache while this object exists."""

    def __init__(self, descriptor: int, entry: ShardEntry) -> None:
        self._descriptor, self._entry = descriptor, entry

    @cached_property
    def index(self) -> Index:
        """The records, verified as they are read; raises ShardError or OSError if the copy is damaged."""
        # not a method of this object, because a cycle of references would delay its deletion
        read = partial(os.pread, self._descriptor)
        return Index.open_copy(read, f"of the copy of {self._entry.name}", self._entry.bytes, self._entry.samples)

    def read(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, min(length, max(0, self._entry.bytes - offset)), offset)

    def __del__(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class _PlannedShard:
    """A shard that this process is going to read."""

    key: str
    num_bytes: int
    first_slot: int


class ShardCache:
    """The copies that one process reads. Safe to share between threads.

    Args:
        ledger: the cache folder; closed with the cache.
        remote_shard: returns the shard to copy, None for a local shard.
        windows: the shards that this process is going to read, in order.
        start_slot: first slot that is read.
        horizon_slots: maximum number of slots to plan ahead.
        downloads: number of shards to fetch at the same time.

    Attributes:
        hits, misses: how often a shard was or was not in the cache when it was opened.
    """

    def __init__(
        self,
        ledger: Ledger,
        remote_shard: Callable[[int], RemoteShard | None],
        windows: Iterator[Window],
        *,
        start_slot: int,
        horizon_slots: int,
        downloads: int,
    ) -> None:
        self._ledger, self._remote_shard, self._windows = ledger, remote_shard, windows
        self._position, self._horizon_slots = start_slot, horizon_slots
        self.hits = self.misses = 0
        self._claiming = threading.Lock()
        self._changed = threading.Condition()  # guards all attributes below
        self._ahead: list[Window] = []
        self._planned: dict[int, _PlannedShard] = {}  # in the order of first use
        self._open: OrderedDict[int, CachedShard] = OrderedDict()
        self._waiting: Counter[int] = Counter()  # number of waiting readers by shard
        self._fetching: set[int] = set()
        self._failures: dict[int, Exception] = {}
        self._refused_until: dict[int, float] = {}  # shards for which there was no room
        self._busy_until: dict[int, float] = {}  # shards that another process fetches
        self._full_until = self._published_at = 0.0
        self._num_consumed = 0  # windows read to their end
        self._has_warned_of_direct_reads = False
        self._folder_error: OSError | None = None  # ends the download threads
        self._closing = threading.Event()
        self._plan()
        self._threads = [
            threading.Thread(target=self._run, daemon=True, name="shard-download") for _ in range(downloads)
        ]
        for thread in self._threads:
            thread.start()

    def get(self, shard: int) -> CachedShard | None:
        """Return the copy of a shard, waiting for its download; None to read the original.

        Raises:
            ShardError: the shard cannot be fetched; names it.
        """
        with self._changed:
            cached = self._open.get(shard)
            if cached is not None:
                self._open.move_to_end(shard)
                return cached
        remote = self._remote_shard(shard)
        if remote is None:
            return None
        cached = self._open_copy(remote)
        with self._changed:
            if cached is not None:
                self.hits += 1
                return self._keep_open(shard, cached)
            self.misses += 1
            if shard not in self._planned:
                return None
            return self._wait_for(shard, remote)

    def mark_consumed(self, slot: int) -> None:
        """Record that this process has read all its slots before ``slot``."""
        with self._changed:
            self._position = slot
            consumed = [window for window in self._ahead if window.last_slot < slot]
            if not consumed:
                return
            self._ahead = [window for window in self._ahead if window.last_slot >= slot]
            in_use = {shard for window in self._ahead if window.first_slot < slot for shard in window.shards}
            for shard in {shard for window in consumed for shard in window.shards} - in_use:
                self._open.pop(shard, None)
            self._plan()
            # shards that were in use may now make room
            self._num_consumed += len(consumed)
            self._full_until = 0.0
            self._refused_until.clear()
            self._changed.notify_all()

    def discard(self, shard: int) -> None:
        with self._changed:
            self._open.pop(shard, None)
        remote = self._remote_shard(shard)
        if remote is not None:
            try:
                self._ledger.discard(_key(remote))
            except OSError as error:
                raise self._unusable_folder(error) from error

    def close(self) -> None:
        """Stop fetching; readers that wait for a shard get a ShardError."""
        self._closing.set()
        with self._changed:
            self._open.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            # a thread that waits for a stalled server ends later by itself
            thread.join(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(OSError):  # the folder may be gone
            self._ledger.close()

    def _open_copy(self, remote: RemoteShard) -> CachedShard | None:
        try:
            descriptor = with_descriptors(lambda: self._ledger.open(_key(remote), copy_bytes(remote.entry)))
        except OSError as error:
            raise self._unusable_folder(error) from error
        return None if descriptor is None else CachedShard(descriptor, remote.entry)

    def _unusable_folder(self, error: OSError) -> ShardError:
        return ShardError(f"the cache folder {self._ledger.folder} is no longer usable ({explain_os_error(error)})")

    def _keep_open(self, shard: int, cached: CachedShard) -> CachedShard:
        self._open[shard] = cached
        while len(self._open) > max_open_files():
            self._open.popitem(last=False)
        return cached

    def _wait_for(self, shard: int, remote: RemoteShard) -> CachedShard | None:
        # a prefetch that failed may succeed now
        self._failures.pop(shard, None)
        self._waiting[shard] += 1
        self._changed.notify_all()
        try:
            while not self._closing.is_set():
                if self._folder_error is not None:
                    raise self._unusable_folder(self._folder_error)
                if shard in self._failures:
                    raise self._failures[shard]
                if self._refused_until.get(shard, 0.0) > time.monotonic():
                    return None
                cached = self._open_copy(remote)
                if cached is not None:
                    return self._keep_open(shard, cached)
                self._changed.wait()
            raise ShardError(f"waiting for {remote.tar.url} was cancelled: the cache is closed")
        finally:
            self._waiting[shard] -= 1
            if not self._waiting[shard]:
                del self._waiting[shard]

    def _plan(self) -> None:
        """Plan the next shards, up to the size limit of the folder."""
        planned: dict[int, _PlannedShard] = {}
        num_bytes = 0
        number = 0
        while num_bytes < self._ledger.limit_bytes:
            if number == len(self._ahead):
                if self._ahead and self._ahead[-1].first_slot > self._position + self._horizon_slots:
                    break
                following = next(self._windows, None)
                if following is None:
                    break
                if following.last_slot < self._position:
                    continue
                self._ahead.append(following)
            window = self._ahead[number]
            number += 1
            for shard in window.shards:
                if shard in planned:
                    continue
                known = self._planned.get(shard)
                if known is not None:
                    planned[shard] = replace(known, first_slot=window.first_slot)
                elif (remote := self._remote_shard(shard)) is not None:
                    planned[shard] = _PlannedShard(_key(remote), copy_bytes(remote.entry), window.first_slot)
                else:
                    continue
                num_bytes += planned[shard].num_bytes
        self._planned = planned

    def _publish(self) -> None:
        """Publish the distance in slots to the next use of each planned shard."""
        with self._changed:
            uses = {plan.key: max(0, plan.first_slot - self._position) for plan in self._planned.values()}
        self._ledger.publish(uses)

    def _run(self) -> None:
        while True:
            # one thread at a time chooses a shard and makes room, so room goes to the shard needed first
            with self._claiming:
                claim = self._claim()
            if claim is None:
                return
            shard, reservation = claim
            self._record_outcome(shard, self._fetch(shard, reservation))

    def _claim(self) -> tuple[int, Reservation] | None:
        """Wait until a shard is needed and reserve room for it; None when the cache is closed or broken."""
        while True:
            with self._changed:
                if self._closing.is_set():
                    return None
                try:
                    shard = self._choose()
                except OSError as error:
                    self._folder_error = error
                    self._changed.notify_all()
                    return None
                if shard is None:
                    self._changed.wait(_BUSY_SECONDS if self._busy_until else _FULL_SECONDS)
                else:
                    self._fetching.add(shard)
                num_consumed = self._num_consumed
            if shard is None:
                self._publish_regularly()
                continue
            result = self._reserve(shard)
            if isinstance(result, Reservation):
                return shard, result
            is_outdated = result is Refusal.FULL and num_consumed != self._num_consumed
            self._record_outcome(shard, None if is_outdated else result)

    def _choose(self) -> int | None:
        now = time.monotonic()
        self._busy_until = {shard: until for shard, until in self._busy_until.items() if until > now}

        def is_available(shard: int) -> bool:
            is_refused = self._refused_until.get(shard, 0.0) > now
            is_claimed = shard in self._fetching or shard in self._busy_until
            return not is_refused and not is_claimed and shard not in self._failures

        for shard in self._waiting:
            if is_available(shard):
                return shard
        if now < self._full_until:
            return None
        present = self._ledger.present()
        for shard, plan in self._planned.items():
            if plan.key not in present and is_available(shard):
                return shard
        return None

    def _publish_regularly(self) -> None:
        """Keep the other processes informed while nothing is fetched."""
        with self._changed:
            if time.monotonic() - self._published_at < _PUBLISH_SECONDS:
                return
            self._published_at = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk is an error only when a shard is to be fetched
            self._publish()

    def _reserve(self, shard: int) -> Reservation | Refusal | ShardError:
        remote = self._remote_shard(shard)
        assert remote is not None
        try:
            self._publish()
            return self._ledger.reserve(_key(remote), copy_bytes(remote.entry))
        except OSError as error:
            return self._disk_error(remote, error)

    def _fetch(self, shard: int, reservation: Reservation) -> Exception | None:
        """Copy a shard; return the error, if any."""
        remote = self._remote_shard(shard)
        assert remote is not None
        try:
            _download(remote, reservation.path, self._closing)
            reservation.commit()
        except OSError as error:
            reservation.discard()
            return self._disk_error(remote, error)
        except Exception as error:  # raised in the reader that needs the shard
            reservation.release()
            return None if isinstance(error, DownloadStopped) else error
        return None

    def _disk_error(self, remote: RemoteShard, error: OSError) -> ShardError:
        return ShardError(
            f"the cache folder {self._ledger.folder} cannot store the {copy_bytes(remote.entry)} bytes of "
            f"{remote.tar.url} ({error.strerror}); free space there, or lower the limit of the cache"
        )

    def _record_outcome(self, shard: int, outcome: Refusal | Exception | None) -> None:
        """Record the result of an attempt to fetch a shard; None is success."""
        now = time.monotonic()
        with self._changed:
            self._fetching.discard(shard)
            if outcome is Refusal.BUSY:
                self._busy_until[shard] = now + _BUSY_SECONDS
            elif outcome is Refusal.FULL:
                self._full_until = self._refused_until[shard] = now + _FULL_SECONDS
                self._warn_of_direct_reads(shard)
            elif isinstance(outcome, Exception):
                self._failures[shard] = outcome
                self._full_until = now + _FULL_SECONDS  # pause before the next prefetch
                if shard not in self._waiting:
                    logger.warning("%s; will be retried when the shard is needed", outcome)
            self._changed.notify_all()

    def _warn_of_direct_reads(self, shard: int) -> None:
        if shard in self._waiting and not self._has_warned_of_direct_reads:
            self._has_warned_of_direct_reads = True
            logger.warning(
                "the cache folder %s has no room within its limit of %d bytes for a shard that is needed now; its "
                "images are read over the network, which a higher limit avoids (logged once)",
                self._ledger.folder,
                self._ledger.limit_bytes,
            )


def _key(remote: RemoteShard) -> str:
    """Return the name of a shard's copy.

    The URL separates shards with the same file name; length and checksum separate versions of one shard. They come
    from the manifest, so unlike an ETag they need no request and stay the same when the object is copied.
    """
    entry = remote.entry
    identity = [remote.tar.url, entry.bytes, entry.sha256, entry.samples, RECORD.descr, _VERSION]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _download(remote: RemoteShard, path: Path, stop: threading.Event) -> None:
    """Write the tar and its index durably to ``path``; raises as ``Store.download``."""
    entry = remote.entry
    index = remote.load_index().to_bytes()
    if path.stat().st_size > entry.bytes:
        os.truncate(path, entry.bytes)
    remote.tar.store.download(remote.tar.name, path, entry.bytes, entry.sha256, stop)
    with open(path, "ab") as file:
        file.write(index)
        file.flush()
        os.fsync(file.fileno())
