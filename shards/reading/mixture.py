"""Mixture of several shard sets in one stream, in fixed proportions.

The stream consists of cycles. Each member has a fixed whole number of slots per cycle, spread evenly, so each cycle has
the exact proportions and each part of it nearly so. The member at a slot, and the slot in that member's own order,
follow by arithmetic. Each member has its own epochs. If a member's slots per round do not divide evenly among its
lanes, some of its shards are read by several ranks.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np

from shards import randomness
from shards.errors import SampleError, ShardError
from shards.reading.order import Order, Window
from shards.reading.shard_set import RemoteShard, ShardCopies, ShardSet
from shards.storage.store import RetryPolicy, Traffic

_MIN_CYCLE = 1000  # slots; weights are accurate to a thousandth of the stream


class Mixture:
    """The order of a stream over several shard sets; shards are numbered consecutively through all members.

    Args:
        sizes: samples in each shard, for each member.
        weights: positive, of any scale; a member's share of a cycle is proportional, rounded to whole slots.
        cycle: slots per cycle.
        seed, window, lanes, lane_block: see ``Order``; each member's lanes get its share of ``lane_block``.

    Attributes:
        counts: slots per cycle of each member.
        lanes: number of lanes, numbered through all members.
        parameters: see ``Order``.

    Raises:
        ShardError: a weight is not positive, or too small for a single slot per cycle.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int] | np.ndarray],
        weights: Sequence[float],
        cycle: int,
        seed: int,
        window: int = 16,
        lanes: int = 64,
        lane_block: int = 1,
    ) -> None:
        self.counts = _apportion(weights, cycle)
        self.cycle = cycle
        self.parameters: dict[str, int | list[int]] = {
            "seed": seed,
            "window": window,
            "lanes": lanes,
            "lane_block": lane_block,
            "cycle": cycle,
            "counts": list(self.counts),
        }
        seeds = [randomness.derive_seed(seed, randomness.MIXTURE, member) for member in range(len(sizes))]
        lane_blocks = [max(1, lane_block * count // cycle) for count in self.counts]
        self._orders = [
            Order(member_sizes, member_seed, window, lanes, member_block)
            for member_sizes, member_seed, member_block in zip(sizes, seeds, lane_blocks, strict=True)
        ]
        self._first_shard = np.cumsum([0, *(len(member_sizes) for member_sizes in sizes)])
        # The ideal position of the k-th of a member's c slots is (k + 1/2) / c of the cycle; sorting by it spreads the
        # slots of every member evenly.
        members = np.repeat(np.arange(len(sizes)), self.counts)
        ranks = np.concatenate([np.arange(count) for count in self.counts])
        order = np.lexsort((members, (ranks + 0.5) / np.array(self.counts)[members]))
        self._member, self._rank = members[order], ranks[order]
        self._first_lane = np.cumsum([0, *(order.lanes for order in self._orders)])
        self.lanes = int(self._first_lane[-1])

    @property
    def lane_cycle(self) -> int:
        """Number of slots after which the sequence of lanes repeats."""
        repeats = (o.lane_cycle // math.gcd(o.lane_cycle, c) for o, c in zip(self._orders, self.counts, strict=True))
        return self.cycle * math.lcm(*repeats)

    def member_slots(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the member at each slot and the slot in the member's own order, int64 [num_slots] each."""
        cycles, offsets = np.divmod(np.asarray(slots, dtype=np.int64), self.cycle)
        members = self._member[offsets]
        return members, cycles * np.array(self.counts)[members] + self._rank[offsets]

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Order.locate``; shards are numbered through all members."""
        members, own = self.member_slots(slots)
        located = np.empty((2, len(members)), dtype=np.int64)
        for member in np.unique(members):
            rows = members == member
            located[:, rows] = self._orders[member].locate(own[rows])
        return located[0] + self._first_shard[members], located[1]

    def lanes_of(self, slots: np.ndarray) -> np.ndarray:
        members, own = self.member_slots(slots)
        lanes = np.empty_like(own)
        for member in np.unique(members):
            rows = members == member
            lanes[rows] = self._orders[member].lanes_of(own[rows]) + self._first_lane[member]
        return lanes

    def windows(self, start_slot: int, lanes: Collection[int]) -> Iterator[Window]:
        streams = []
        for member in range(len(self._orders)):
            first, end = self._first_lane[member : member + 2]
            own_lanes = [lane - int(first) for lane in lanes if first <= lane < end]
            if own_lanes:
                streams.append(self._member_windows(member, start_slot, own_lanes))
        return heapq.merge(*streams, key=lambda window: window.first_slot)

    def _member_windows(self, member: int, start_slot: int, lanes: Collection[int]) -> Iterator[Window]:
        offsets = np.flatnonzero(self._member == member)  # of the member's slots in the cycle

        def slot_at(own: int) -> int:
            cycles, rank = divmod(own, len(offsets))
            return cycles * self.cycle + int(offsets[rank])

        cycles, offset = divmod(start_slot, self.cycle)
        own_start = cycles * len(offsets) + int(np.searchsorted(offsets, offset))
        first_shard = int(self._first_shard[member])
        for window in self._orders[member].windows(own_start, lanes):
            shards = tuple(first_shard + shard for shard in window.shards)
            yield Window(slot_at(window.first_slot), slot_at(window.last_slot), shards)

    def substitute(self, slot: int, attempt: int) -> tuple[int, int]:
        """See ``Order.substitute``; the replacement is from the same member."""
        members, own = self.member_slots(np.array([slot]))
        shard, sample = self._orders[members[0]].substitute(int(own[0]), attempt)
        return shard + int(self._first_shard[members[0]]), sample


class JoinedSet:
    """Several shard sets read as one; shards are numbered through all members, labels are those of each member.

    Attributes:
        weights: relative share of each member in the stream, of any scale.
        pixels: channels and dtype of the images of all members.
    """

    def __init__(self, members: Sequence[ShardSet], weights: Sequence[float]) -> None:
        self.members, self.weights = tuple(members), tuple(weights)
        self._first_shard = np.cumsum([0, *(member.num_shards for member in members)])
        self.num_samples = sum(member.num_samples for member in members)
        self.num_shards = int(self._first_shard[-1])
        self.is_remote = any(member.is_remote for member in members)
        self.pixels = members[0].pixels

    @property
    def traffic(self) -> Traffic:
        """Bytes received over the network so far, and retries, of all members."""
        total = Traffic()
        for member in self.members:
            total.add(member.traffic.num_bytes, member.traffic.num_retries)
        return total

    @property
    def digest(self) -> str:
        """Digest of the members, in order, and their shares, which a saved stream must match."""
        total = sum(self.weights)
        members = zip(self.members, self.weights, strict=True)
        content = " ".join(f"{member.digest}:{weight / total:.9f}" for member, weight in members)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def name(self, shard: int) -> str:
        """Return the name of a shard for log messages: the member's number and the shard's name."""
        member, own = self._own(shard)
        return f"{member}/{self.members[member].name(own)}"

    def record(self, shard: int, sample: int) -> np.void:
        """See ``ShardSet.record``; a SampleError names the shard as ``name`` does."""
        with self._naming(shard) as (member, own):
            return member.record(own, sample)

    def read(self, shard: int, sample: int) -> bytes:
        """See ``ShardSet.read``; a SampleError names the shard as ``name`` does."""
        with self._naming(shard) as (member, own):
            return member.read(own, sample)

    def part_reader(self, shard: int, sample: int) -> Callable[[int, int], bytes]:
        """See ``ShardSet.part_reader``; a SampleError of this call names the shard as ``name`` does."""
        with self._naming(shard) as (member, own):
            return member.part_reader(own, sample)

    def key(self, shard: int, sample: int) -> str:
        member, own = self._own(shard)
        return self.members[member].key(own, sample)

    def remote_shard(self, shard: int) -> RemoteShard | None:
        member, own = self._own(shard)
        return self.members[member].remote_shard(own)

    def with_copies(self, copies: ShardCopies) -> JoinedSet:
        """See ``ShardSet.with_copies``; the copies are numbered through all members."""
        members = zip(self.members, self._first_shard[:-1].tolist(), strict=True)
        return JoinedSet([member.with_copies(copies, first) for member, first in members], self.weights)

    @contextmanager
    def _naming(self, shard: int) -> Iterator[tuple[ShardSet, int]]:
        member, own = self._own(shard)
        try:
            yield self.members[member], own
        except SampleError as error:
            raise SampleError(self.name(shard), error.index, error.key, error.reason) from error

    def _own(self, shard: int) -> tuple[int, int]:
        member = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return member, shard - int(self._first_shard[member])


AnyOrder: TypeAlias = Order | Mixture
AnySet: TypeAlias = ShardSet | JoinedSet


def open_sets(shares: Sequence[tuple[str, float]], policy: RetryPolicy | None = None) -> AnySet:
    """Open one shard set, or several as a ``JoinedSet``.

    Args:
        shares: path or URL of each set, with its weight in the stream (positive, of any scale).

    Raises:
        ShardError: a set is missing or unfinished, a file is missing or truncated, or the sets have different pixels;
            the message gives the remedy.
    """
    members = [ShardSet.open(location, policy) for location, _ in shares]
    for (location, _), member in zip(shares, members, strict=True):
        if member.pixels != members[0].pixels:
            raise ShardError(f"{location} has {member.pixels}, {shares[0][0]} has {members[0].pixels}; mix equal sets")
    return members[0] if len(members) == 1 else JoinedSet(members, [weight for _, weight in shares])


def build_order(shard_set: AnySet, seed: int, window: int, lanes: int, lane_block: int) -> AnyOrder:
    """Return the order of the stream over an opened set; for the arguments, see ``Order``.

    Raises:
        ShardError: a set has no samples, or a weight is too small for the mixture.
    """
    if isinstance(shard_set, ShardSet):
        return Order(shard_set.sizes, seed, window, lanes, lane_block)
    lane_cycle = lanes * lane_block
    cycle = lane_cycle * -(-_MIN_CYCLE // lane_cycle)
    sizes = [member.sizes for member in shard_set.members]
    return Mixture(sizes, shard_set.weights, cycle, seed, window, lanes, lane_block)


def _apportion(weights: Sequence[float], cycle: int) -> tuple[int, ...]:
    """Return whole slots in proportion to the weights, by the largest-remainder method."""
    if not weights or min(weights) <= 0:
        raise ShardError(f"the weights of a mixture must be above 0, not {list(weights)}")
    ideal = np.array(weights, dtype=np.float64) * cycle / sum(weights)
    counts = np.floor(ideal).astype(int)
    by_remainder = np.argsort(counts - ideal, kind="stable")
    counts[by_remainder[: cycle - int(counts.sum())]] += 1
    if counts.min() == 0:
        raise ShardError(
            f"weight {weights[int(counts.argmin())]} of {sum(weights)} is below one of the {cycle} slots per cycle; "
            "use a larger weight, or remove that set"
        )
    return tuple(counts.tolist())
