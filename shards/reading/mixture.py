"""Several shard sets in one stream, in fixed proportions.

The stream goes in cycles. Each member has the same whole number of slots in every cycle, spread as evenly as they
go, so that every cycle has the exact proportions and every stretch of it nearly so; which member stands at a slot,
and at which slot of its own order, is plain arithmetic. Members have epochs of their own. A rank's part of a batch
reads its own lanes' shards of a member as far as the member's slots in a turn of the lanes divide among them; the
rest is read by more ranks than one.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from shards import randomness
from shards.errors import SampleError, ShardError
from shards.reading.order import Block, Order
from shards.reading.shard_set import Copies, OpenShard, RemoteShard, ShardSet
from shards.storage.store import Patience, Traffic

_LEAST_CYCLE = 1000  # so that a weight is kept to a thousandth of the stream


class Mixture:
    """The order of a stream over several shard sets; shards are numbered through all members.

    Args:
        sizes: for each member, the samples in each of its shards.
        weights: positive, of any scale; a member's share of each cycle is its weight's share, rounded to whole slots.
        cycle: slots in a cycle.
        seed, window, lanes, lane_block: as in ``Order``; a member's lanes have their share of ``lane_block``.

    Attributes:
        counts: slots of each member in a cycle.

    Raises:
        ShardError: a weight is not positive, or rounds to no slot at all.
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
        self.cycle, self.seed, self.window = cycle, seed, window
        self.lanes, self.lane_block = lanes, lane_block
        self._orders = [
            Order(
                member_sizes,
                randomness.derive_seed(seed, randomness.MIXTURE, member),
                window,
                lanes,
                max(1, lane_block * self.counts[member] // cycle),
            )
            for member, member_sizes in enumerate(sizes)
        ]
        self._first_shard = np.cumsum([0, *(len(member_sizes) for member_sizes in sizes)])
        # The k-th slot of a member with c slots wants to stand at (k + 1/2) / c of the cycle; sorting these wishes
        # gives every stretch of the cycle its share of every member.
        members = np.repeat(np.arange(len(sizes)), self.counts)
        ranks = np.concatenate([np.arange(count) for count in self.counts])
        order = np.lexsort((members, (ranks + 0.5) / np.array(self.counts)[members]))
        self._member, self._rank = members[order], ranks[order]
        self._first_lane = np.cumsum([0, *(order.num_lanes for order in self._orders)])

    @property
    def parameters(self) -> dict[str, int | list[int]]:
        """What defines the order beside the shards' sizes; a saved stream must agree in every entry."""
        return {
            "seed": self.seed,
            "window": self.window,
            "lanes": self.lanes,
            "lane_block": self.lane_block,
            "cycle": self.cycle,
            "counts": list(self.counts),
        }

    @property
    def num_lanes(self) -> int:
        """As ``SlotOrder.num_lanes``; numbered through all members."""
        return int(self._first_lane[-1])

    @property
    def lane_cycle(self) -> int:
        """As ``SlotOrder.lane_cycle``."""
        repeats = (o.lane_cycle // math.gcd(o.lane_cycle, c) for o, c in zip(self._orders, self.counts, strict=True))
        return self.cycle * math.lcm(*repeats)

    def member_slots(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The member at each slot, and the slot of that member's own order, int64 [num_slots] each."""
        cycles, places = np.divmod(np.asarray(slots, dtype=np.int64), self.cycle)
        members = self._member[places]
        return members, cycles * np.array(self.counts)[members] + self._rank[places]

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As ``Order.locate``: the member's epoch, the shard (numbered through all members) and the sample in it."""
        members, own = self.member_slots(slots)
        found = np.empty((3, len(members)), dtype=np.int64)
        for member in np.unique(members):
            chosen = members == member
            found[:, chosen] = self._orders[member].locate(own[chosen])
        return found[0], found[1] + self._first_shard[members], found[2]

    def lanes_of(self, slots: np.ndarray) -> np.ndarray:
        """As ``Order.lanes_of``."""
        members, own = self.member_slots(slots)
        lanes = np.empty_like(own)
        for member in np.unique(members):
            chosen = members == member
            lanes[chosen] = self._orders[member].lanes_of(own[chosen]) + self._first_lane[member]
        return lanes

    def blocks(self, start_slot: int, lanes: Collection[int]) -> Iterator[Block]:
        """As ``Order.blocks``."""
        streams = []
        for member in range(len(self._orders)):
            first, end = self._first_lane[member : member + 2]
            own_lanes = [lane - int(first) for lane in lanes if first <= lane < end]
            if own_lanes:
                streams.append(self._member_blocks(member, start_slot, own_lanes))
        return heapq.merge(*streams, key=lambda block: block.first_slot)

    def _member_blocks(self, member: int, start_slot: int, lanes: Collection[int]) -> Iterator[Block]:
        places = np.flatnonzero(self._member == member)  # in the cycle, by the member's own slot in it

        def slot_at(own: int) -> int:
            cycles, rank = divmod(own, len(places))
            return cycles * self.cycle + int(places[rank])

        cycles, place = divmod(start_slot, self.cycle)
        own_start = cycles * len(places) + int(np.searchsorted(places, place))
        first_shard = int(self._first_shard[member])
        for block in self._orders[member].blocks(own_start, lanes):
            shards = tuple(first_shard + shard for shard in block.shards)
            yield Block(slot_at(block.first_slot), slot_at(block.last_slot), shards)

    def substitute(self, slot: int, attempt: int) -> tuple[int, int]:
        """As ``Order.substitute``; a sample of the same member."""
        members, own = self.member_slots(np.array([slot]))
        shard, sample = self._orders[members[0]].substitute(int(own[0]), attempt)
        return shard + int(self._first_shard[members[0]]), sample


class JoinedSet:
    """Several shard sets read as one; shards are numbered through all members. Labels stay the members' own.

    Attributes:
        members: the sets.
        weights: of the members in a stream, of any scale.
    """

    def __init__(self, members: Sequence[ShardSet], weights: Sequence[float]) -> None:
        self.members, self.weights = tuple(members), tuple(weights)
        self._first_shard = np.cumsum([0, *(len(member.manifest.shards) for member in members)])

    @property
    def num_samples(self) -> int:
        """Images in all members."""
        return sum(member.num_samples for member in self.members)

    @property
    def num_shards(self) -> int:
        """Tars of all members."""
        return int(self._first_shard[-1])

    @property
    def is_remote(self) -> bool:
        """As ``ShardSet.is_remote``, of any member."""
        return any(member.is_remote for member in self.members)

    @property
    def traffic(self) -> Traffic:
        """What has come over the network so far."""
        total = Traffic()
        for member in self.members:
            total.add(member.traffic.num_bytes, member.traffic.num_retries)
        return total

    @property
    def digest(self) -> str:
        """What a saved stream must agree with: the members, in order, and their shares of the stream."""
        total = sum(self.weights)
        members = zip(self.members, self.weights, strict=True)
        content = " ".join(f"{member.digest}:{weight / total:.9f}" for member, weight in members)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def name(self, shard: int) -> str:
        """What logs call a shard: its set's number and its own name."""
        member, own = self._own(shard)
        return f"{member}/{self.members[member].name(own)}"

    def record(self, shard: int, sample: int) -> np.void:
        """As ``ShardSet.record``."""
        member, own = self._own(shard)
        return self.members[member].record(own, sample)

    def read(self, shard: int, sample: int) -> bytes:
        """As ``ShardSet.read``; a SampleError names the shard as ``name`` does."""
        member, own = self._own(shard)
        try:
            return self.members[member].read(own, sample)
        except SampleError as error:
            raise SampleError(self.name(shard), error.index, error.key, error.reason) from error

    def key(self, shard: int, sample: int) -> str:
        """As ``ShardSet.key``."""
        member, own = self._own(shard)
        return self.members[member].key(own, sample)

    def remote(self, shard: int) -> RemoteShard | None:
        """As ``ShardSet.remote``."""
        member, own = self._own(shard)
        return self.members[member].remote(own)

    def reading_copies(self, copies: Copies) -> JoinedSet:
        """As ``ShardSet.reading_copies``; the copies are numbered through all members."""
        firsts = self._first_shard[:-1].tolist()
        members = zip(self.members, firsts, strict=True)
        return JoinedSet([m.reading_copies(_MemberCopies(copies, first)) for m, first in members], self.weights)

    def _own(self, shard: int) -> tuple[int, int]:
        member = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        return member, shard - int(self._first_shard[member])


class _MemberCopies:
    """The copies of one member of a joined set, numbered as its own."""

    def __init__(self, copies: Copies, first_shard: int) -> None:
        self._copies, self._first_shard = copies, first_shard

    def get(self, shard: int) -> OpenShard | None:
        return self._copies.get(self._first_shard + shard)

    def discard(self, shard: int) -> None:
        self._copies.discard(self._first_shard + shard)


AnySet: TypeAlias = ShardSet | JoinedSet


def open_sets(shares: Sequence[tuple[str, float]], patience: Patience | None = None) -> AnySet:
    """Open one or several shard sets, each a path or URL with its weight; raises as ``ShardSet.open``."""
    members = [ShardSet.open(location, patience) for location, _ in shares]
    return members[0] if len(members) == 1 else JoinedSet(members, [weight for _, weight in shares])


def stream_order(
    shard_set: AnySet, seed: int, window: int, lanes: int, lane_block: int
) -> Order | Mixture:
    """The order of the stream over what ``open_sets`` gave; the arguments are as in ``Order``.

    Raises:
        ShardError: a set holds no samples, or a weight is too small for the mixture.
    """
    if isinstance(shard_set, ShardSet):
        return Order(shard_set.sizes, seed, window, lanes, lane_block)
    turn = lanes * lane_block
    cycle = turn * -(-_LEAST_CYCLE // turn)
    sizes = [member.sizes for member in shard_set.members]
    return Mixture(sizes, shard_set.weights, cycle, seed, window, lanes, lane_block)


def _apportion(weights: Sequence[float], cycle: int) -> tuple[int, ...]:
    """Whole slots in proportion to the weights, by largest remainder."""
    if not weights or min(weights) <= 0:
        raise ShardError(f"the weights of a mixture must be above 0, not {list(weights)}")
    wished = np.array(weights, dtype=np.float64) * cycle / sum(weights)
    counts = np.floor(wished).astype(int)
    by_remainder = np.argsort(counts - wished, kind="stable")
    counts[by_remainder[: cycle - int(counts.sum())]] += 1
    if counts.min() == 0:
        raise ShardError(
            f"weight {weights[int(counts.argmin())]} of {sum(weights)} is less than one slot of a cycle of {cycle}; "
            "use a larger weight, or leave that set out"
        )
    return tuple(counts.tolist())
