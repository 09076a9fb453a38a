"""Local copies of remote shards, fetched ahead of need into a folder of bounded size.

Which shards a process reads, and when, follows from the order alone (``shards.reading.order.Block``). Threads fetch
them in that order, each with its index behind it in one file, as far ahead as the limit of the folder allows
(``shards.reading.ledger``). A reader waits for a shard that is being fetched. It reads the original where the folder
has no room, because all cached shards are in use or needed sooner, and for shards outside the order. So no reader
waits for room, and processes that share a folder cannot block each other.
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
from pathlib import Path

import numpy as np

from shards.errors import ShardError
from shards.format.index import RECORD
from shards.format.set_manifest import ShardEntry
from shards.reading.ledger import USE_BYTES, Ledger, Refusal, Reservation
from shards.reading.order import Block
from shards.reading.shard_set import RemoteShard
from shards.storage.store import Interrupted

_OPEN_SHARDS = 200  # copies that are kept open; the usual limit of open files is 1024
_BUSY_SECONDS = 0.2  # between two looks at a shard that another process fetches
_FULL_SECONDS = 1.0  # between two attempts to find room
_TELL_SECONDS = 5.0  # between two messages to the other processes
_JOIN_SECONDS = 2.0

_log = logging.getLogger(__name__)


def copy_bytes(entry: ShardEntry) -> int:
    """The length of a shard's copy: the tar, and its index behind it."""
    return entry.bytes + entry.samples * RECORD.itemsize


def bytes_in_use(entries: Sequence[ShardEntry], num_shards: int, processes: int) -> int:
    """The least limit of a folder that holds any ``num_shards`` of these at a time, for so many processes."""
    largest = sorted(map(copy_bytes, entries), reverse=True)[:num_shards]
    return sum(largest) + processes * USE_BYTES * (len(largest) + 1)


class CachedShard:
    """A copy, which stays in the cache as long as this object lives."""

    def __init__(self, descriptor: int, entry: ShardEntry) -> None:
        self._descriptor, self._entry = descriptor, entry

    def records(self) -> np.ndarray:
        """As ``OpenShard.records``."""
        content = os.pread(self._descriptor, self._entry.samples * RECORD.itemsize, self._entry.bytes)
        return np.frombuffer(content, RECORD)

    def record(self, sample: int) -> np.void:
        """As ``OpenShard.record``."""
        offset = self._entry.bytes + range(self._entry.samples)[sample] * RECORD.itemsize
        return np.frombuffer(os.pread(self._descriptor, RECORD.itemsize, offset), RECORD)[0]

    def read(self, length: int, offset: int) -> bytes:
        """As ``Tar.read``."""
        return os.pread(self._descriptor, min(length, max(0, self._entry.bytes - offset)), offset)

    def __del__(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class _Planned:
    """A shard that is going to be read."""

    key: str
    num_bytes: int
    first_slot: int


class ShardCache:
    """The copies that one process reads. Safe to share between threads.

    Args:
        ledger: of the folder; closed with the cache.
        remote: what can be copied of a shard, None of a local one.
        blocks: which shards this process is going to read, in order.
        start_slot: where it begins to read.
        horizon_slots: how far ahead to look at most.
        downloads: shards to fetch at a time.

    Attributes:
        hits, misses: how often a shard was there, or not yet, when it was to be opened.
    """

    def __init__(
        self,
        ledger: Ledger,
        remote: Callable[[int], RemoteShard | None],
        blocks: Iterator[Block],
        *,
        start_slot: int,
        horizon_slots: int,
        downloads: int,
    ) -> None:
        self._ledger, self._remote, self._blocks = ledger, remote, blocks
        self._position, self._horizon_slots = start_slot, horizon_slots
        self.hits = self.misses = 0
        self._claiming = threading.Lock()
        self._changed = threading.Condition()  # guards everything below
        self._ahead: list[Block] = []
        self._planned: dict[int, _Planned] = {}  # in the order of first use
        self._held: OrderedDict[int, CachedShard] = OrderedDict()
        self._demanded: Counter[int] = Counter()  # waiting readers by shard
        self._fetching: set[int] = set()
        self._failures: dict[int, Exception] = {}
        self._refused_until: dict[int, float] = {}  # no room for these
        self._busy_until: dict[int, float] = {}  # another process fetches these
        self._full_until = self._told_at = 0.0
        self._num_done = 0  # blocks read to their end
        self._told_of_direct_reads = False
        self._broken: OSError | None = None  # what keeps the threads from working at all
        self._closing = threading.Event()
        self._look_ahead()
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name="shard-download") for _ in range(downloads)
        ]
        for thread in self._threads:
            thread.start()

    def get(self, shard: int) -> CachedShard | None:
        """The copy of a shard, once it is there; None where the original is to be read.

        Raises:
            ShardError: the shard cannot be fetched; names it.
        """
        with self._changed:
            held = self._held.get(shard)
            if held is not None:
                self._held.move_to_end(shard)
                return held
        remote = self._remote(shard)
        if remote is None:
            return None
        opened = self._open(remote)
        with self._changed:
            if opened is not None:
                self.hits += 1
                return self._hold(shard, opened)
            self.misses += 1
            if shard not in self._planned:
                return None
            return self._wait_for(shard, remote)

    def passed(self, slot: int) -> None:
        """Everything before this slot that this process reads has been read."""
        with self._changed:
            self._position = slot
            done = [block for block in self._ahead if block.last_slot < slot]
            if not done:
                return
            self._ahead = [block for block in self._ahead if block.last_slot >= slot]
            in_use = {shard for block in self._ahead if block.first_slot < slot for shard in block.shards}
            for shard in {shard for block in done for shard in block.shards} - in_use:
                self._held.pop(shard, None)
            self._look_ahead()
            # what was in use until now may be room
            self._num_done += len(done)
            self._full_until = 0.0
            self._refused_until.clear()
            self._changed.notify_all()

    def discard(self, shard: int) -> None:
        """The copy of a shard was found to be damaged."""
        with self._changed:
            self._held.pop(shard, None)
        remote = self._remote(shard)
        if remote is not None:
            self._ledger.discard(_key(remote))

    def close(self) -> None:
        """Stop fetching. Whoever waits for a shard gets a ShardError."""
        self._closing.set()
        with self._changed:
            self._held.clear()
            self._changed.notify_all()
        patience = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            # one that hangs on a stalled server ends by itself
            thread.join(max(0.0, patience - time.monotonic()))
        with contextlib.suppress(OSError):  # the folder is gone
            self._ledger.close()

    def _open(self, remote: RemoteShard) -> CachedShard | None:
        try:
            descriptor = self._ledger.open(_key(remote), copy_bytes(remote.entry))
        except OSError as error:
            raise self._useless(error) from error
        return None if descriptor is None else CachedShard(descriptor, remote.entry)

    def _useless(self, error: OSError) -> ShardError:
        return ShardError(f"the cache folder {self._ledger.folder} cannot be used any more ({error.strerror})")

    def _hold(self, shard: int, opened: CachedShard) -> CachedShard:
        self._held[shard] = opened
        while len(self._held) > _OPEN_SHARDS:
            self._held.popitem(last=False)
        return opened

    def _wait_for(self, shard: int, remote: RemoteShard) -> CachedShard | None:
        # what failed when nobody needed it may be possible by now
        self._failures.pop(shard, None)
        self._demanded[shard] += 1
        self._changed.notify_all()
        try:
            while not self._closing.is_set():
                if self._broken is not None:
                    raise self._useless(self._broken)
                if shard in self._failures:
                    raise self._failures[shard]
                if self._refused_until.get(shard, 0.0) > time.monotonic():
                    return None
                opened = self._open(remote)
                if opened is not None:
                    return self._hold(shard, opened)
                self._changed.wait()
            raise ShardError(f"{remote.tar.url} is not needed any more: the cache is closed")
        finally:
            self._demanded[shard] -= 1
            if not self._demanded[shard]:
                del self._demanded[shard]

    def _look_ahead(self) -> None:
        """Plan as far ahead as the folder can hold."""
        planned: dict[int, _Planned] = {}
        num_bytes = 0
        position = 0
        while num_bytes < self._ledger.limit_bytes:
            if position == len(self._ahead):
                if self._ahead and self._ahead[-1].first_slot > self._position + self._horizon_slots:
                    break
                following = next(self._blocks, None)
                if following is None:
                    break
                if following.last_slot < self._position:
                    continue
                self._ahead.append(following)
            block = self._ahead[position]
            position += 1
            for shard in block.shards:
                if shard in planned:
                    continue
                known = self._planned.get(shard)
                if known is not None:
                    planned[shard] = replace(known, first_slot=block.first_slot)
                elif (remote := self._remote(shard)) is not None:
                    planned[shard] = _Planned(_key(remote), copy_bytes(remote.entry), block.first_slot)
                else:
                    continue
                num_bytes += planned[shard].num_bytes
        self._planned = planned

    def _distances(self) -> dict[str, int]:
        with self._changed:
            return {plan.key: max(0, plan.first_slot - self._position) for plan in self._planned.values()}

    def _work(self) -> None:
        """A thread: fetch what is needed next."""
        while True:
            # one thread at a time looks for it and makes room, so that room goes to what is needed first
            with self._claiming:
                claimed = self._claim()
            if claimed is None:
                return
            shard, reservation = claimed
            self._note(shard, self._fetch(shard, reservation))

    def _claim(self) -> tuple[int, Reservation] | None:
        """Wait for a shard to be needed, and make room for it; None when there is nothing to wait for any more."""
        while True:
            with self._changed:
                if self._closing.is_set():
                    return None
                try:
                    shard = self._choose()
                except OSError as error:
                    self._broken = error
                    self._changed.notify_all()
                    return None
                if shard is None:
                    self._changed.wait(_BUSY_SECONDS if self._busy_until else _FULL_SECONDS)
                else:
                    self._fetching.add(shard)
                num_done = self._num_done
            if shard is None:
                self._tell()
                continue
            given = self._reserve(shard)
            if isinstance(given, Reservation):
                return shard, given
            self._note(shard, None if given is Refusal.FULL and num_done != self._num_done else given)

    def _choose(self) -> int | None:
        now = time.monotonic()
        self._busy_until = {shard: until for shard, until in self._busy_until.items() if until > now}

        def is_free(shard: int) -> bool:
            refused = self._refused_until.get(shard, 0.0) > now
            return not refused and shard not in self._fetching and shard not in self._busy_until

        for shard in self._demanded:
            if shard not in self._failures and is_free(shard):
                return shard
        if now < self._full_until:
            return None
        present = self._ledger.present()
        for shard, plan in self._planned.items():
            if plan.key not in present and shard not in self._failures and is_free(shard):
                return shard
        return None

    def _tell(self) -> None:
        """Let the other processes know from time to time how near the next uses have come."""
        with self._changed:
            if time.monotonic() - self._told_at < _TELL_SECONDS:
                return
            self._told_at = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk is a fault only when a shard is to be fetched
            self._ledger.publish(self._distances())

    def _reserve(self, shard: int) -> Reservation | Refusal | ShardError:
        remote = self._remote(shard)
        assert remote is not None
        try:
            self._ledger.publish(self._distances())
            return self._ledger.reserve(_key(remote), copy_bytes(remote.entry))
        except OSError as error:
            return self._no_space(remote, error)

    def _fetch(self, shard: int, reservation: Reservation) -> Exception | None:
        """Copy a shard; what stood in the way, if anything did."""
        remote = self._remote(shard)
        assert remote is not None
        try:
            _download(remote, reservation.path, self._closing)
            reservation.commit()
        except OSError as error:
            reservation.give_back()
            return self._no_space(remote, error)
        except Exception as error:  # told to whoever needs the shard
            reservation.leave()
            return None if isinstance(error, Interrupted) else error
        return None

    def _no_space(self, remote: RemoteShard, error: OSError) -> ShardError:
        return ShardError(
            f"the cache folder {self._ledger.folder} cannot take the {copy_bytes(remote.entry)} bytes of "
            f"{remote.tar.url} ({error.strerror}); free space there, or lower the limit of the cache"
        )

    def _note(self, shard: int, outcome: Refusal | Exception | None) -> None:
        """What came of an attempt to fetch a shard."""
        now = time.monotonic()
        with self._changed:
            self._fetching.discard(shard)
            if outcome is Refusal.BUSY:
                self._busy_until[shard] = now + _BUSY_SECONDS
            elif outcome is Refusal.FULL:
                self._full_until = self._refused_until[shard] = now + _FULL_SECONDS
                self._tell_of_direct_reads(shard)
            elif isinstance(outcome, Exception):
                self._failures[shard] = outcome
                self._full_until = now + _FULL_SECONDS  # whatever it was: do not hurry to the next
                if shard not in self._demanded:
                    _log.warning("%s; tried again when it is needed", outcome)
            self._changed.notify_all()

    def _tell_of_direct_reads(self, shard: int) -> None:
        if shard in self._demanded and not self._told_of_direct_reads:
            self._told_of_direct_reads = True
            _log.warning(
                "the cache folder %s finds no room within %d bytes for a shard that is needed now; its images are read "
                "over the network, which a higher limit spares (said once)",
                self._ledger.folder,
                self._ledger.limit_bytes,
            )


def _key(remote: RemoteShard) -> str:
    """The name of a shard's copy.

    The URL tells it from others of its name; length and checksum, which the manifest gives, tell it from another
    version of itself, and unlike an ETag they need no request and hold wherever the object is copied to.
    """
    entry = remote.entry
    identity = [remote.tar.url, entry.bytes, entry.sha256, entry.samples, RECORD.descr]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _download(remote: RemoteShard, path: Path, stop: threading.Event) -> None:
    """The tar and the records of its index, on disk when this returns; raises as ``Store.download``."""
    entry = remote.entry
    records = remote.load_records()
    if path.stat().st_size > entry.bytes:
        os.truncate(path, entry.bytes)
    remote.tar.store.download(remote.tar.name, path, entry.bytes, entry.sha256, stop)
    with open(path, "ab") as file:
        file.write(records.tobytes())
        file.flush()
        os.fsync(file.fileno())
