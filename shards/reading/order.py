"""Which sample stands at which slot: a pure function of (shard sizes, seed, slot).

Slot s is the s-th sample ever consumed. With N samples, epoch e is exactly slots [eN, (e+1)N) and visits
every sample once. Three shuffles, none of which needs a list of samples:

1. each epoch draws a permutation of the shards; their samples, laid end to end, form a line of N positions;
2. the line is cut into ``lanes`` contiguous segments, and slot s reads from segment ``(s // lane_block) %
   lanes``, so that consecutive slots come from distant places. With ``lane_block = global_batch / lanes`` a
   rank's contiguous part of a batch reads its own lanes' shards only;
3. a segment is cut into blocks of ``window`` shards (cut short at the segment's ends), and each block is
   shuffled by a permutation of its own.

Memory: two numbers a shard for each of the last few epochs, plus the permutation of one block for each lane
in use (4 bytes a sample of the block).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shards import randomness
from shards.errors import ShardError

_EPOCHS_KEPT = 3
_NEARBY_ATTEMPTS = 8


@dataclass(frozen=True)
class Block:
    """Shards that are shuffled together, and so in use together."""

    first_slot: int  # the first and the last slot that read them
    last_slot: int
    shards: tuple[int, ...]


class SlotOrder(Protocol):
    """What a source, and what fetches shards ahead of it, need to know of an order: ``Order``, or a ``Mixture``."""

    @property
    def num_lanes(self) -> int:
        """Lanes that are read in turns, numbered from 0."""

    @property
    def lane_cycle(self) -> int:
        """Slots after which the lanes' turns repeat."""

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As ``Order.locate``."""

    def substitute(self, slot: int, attempt: int) -> tuple[int, int]:
        """As ``Order.substitute``."""

    def lanes_of(self, slots: np.ndarray) -> np.ndarray:
        """As ``Order.lanes_of``."""

    def blocks(self, start_slot: int, lanes: Collection[int]) -> Iterator[Block]:
        """As ``Order.blocks``."""


@dataclass(frozen=True)
class _Epoch:
    """The tables of one epoch: the line of shards and how the lanes cut it."""

    shards: np.ndarray  # int64 [num_shards]: the shard at each place of the line
    starts: np.ndarray  # int64 [num_shards + 1]: the position where each place begins
    lane_skip: np.ndarray  # int64 [lanes]: slots of the lane before this epoch
    segments: np.ndarray  # int64 [lanes + 1]: the position where each lane's segment begins
    first_place: np.ndarray  # int64 [lanes]: the place in which each segment begins


class Order:
    """The order of an endless stream over shards of the given sizes. Pure, and safe to share between threads.

    Args:
        sizes: samples in each shard.
        seed: any integer.
        window: shards in a block; more mixes better and keeps more shards in use at a time.
        lanes: contiguous segments that are read in turns.
        lane_block: consecutive slots that a lane serves before the next lane's turn.

    Lanes are there to spare reading, and a lane narrower than a window shuffles badly: where there are fewer than
    ``lanes * window`` shards, neighbouring lanes are joined until each has a window of its own.

    Attributes:
        lanes, lane_block: after joining; their product is as given.
    """

    def __init__(
        self, sizes: Sequence[int] | np.ndarray, seed: int, window: int = 16, lanes: int = 64, lane_block: int = 1
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples == 0:
            raise ShardError("the shard set holds no samples; pack some images first")
        if window < 1 or lanes < 1 or lane_block < 1:
            raise ShardError(f"window ({window}), lanes ({lanes}) and lane_block ({lane_block}) must all be at least 1")
        self.seed, self.window = seed, window
        self._asked = {"lanes": lanes, "lane_block": lane_block}
        room = max(1, len(self.sizes) // window)
        self.lanes = max(divisor for divisor in range(1, min(lanes, room) + 1) if lanes % divisor == 0)
        self.lane_block = lane_block * lanes // self.lanes
        self._shard_starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        # lane -> ((epoch, block), permutation)
        self._shuffles: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    @property
    def parameters(self) -> dict[str, int]:
        """What defines the order beside the shards' sizes; a saved stream must agree in every entry."""
        return {"seed": self.seed, "window": self.window, **self._asked}

    @property
    def num_lanes(self) -> int:
        """As ``SlotOrder.num_lanes``."""
        return self.lanes

    @property
    def lane_cycle(self) -> int:
        """As ``SlotOrder.lane_cycle``."""
        return self.lanes * self.lane_block

    def lanes_of(self, slots: np.ndarray) -> np.ndarray:
        """The lane that serves each slot, int64 [num_slots]."""
        return np.asarray(slots, dtype=np.int64) // self.lane_block % self.lanes

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The samples at the given slots.

        Args:
            slots: int64 [num_slots], non-negative, in any order.

        Returns:
            epoch, shard and sample-in-shard, int64 [num_slots] each.
        """
        slots = np.asarray(slots, dtype=np.int64)
        epochs = slots // self.num_samples
        lanes = self.lanes_of(slots)
        shards, samples = np.empty_like(slots), np.empty_like(slots)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            table = self._epoch(int(epoch))
            lane = lanes[chosen]
            position = table.segments[lane] + self._slots_before(lane, slots[chosen]) - table.lane_skip[lane]
            shuffled = self._shuffle(int(epoch), table, lane, position)
            place = np.searchsorted(table.starts, shuffled, side="right") - 1
            shards[chosen] = table.shards[place]
            samples[chosen] = shuffled - table.starts[place]
        return epochs, shards, samples

    def substitute(self, slot: int, attempt: int) -> tuple[int, int]:
        """Who stands in at a slot whose sample cannot be used: (shard, sample), of the arguments only.

        The first attempts draw from the slot's own block, whose shards are at hand; later ones from anywhere.
        """
        draw = float(randomness.generator(self.seed, randomness.SUBSTITUTE, slot, attempt).random())
        if attempt < _NEARBY_ATTEMPTS:
            table = self._epoch(slot // self.num_samples)
            lane = self.lanes_of(np.array([slot]))
            position = table.segments[lane] + self._slots_before(lane, np.array([slot])) - table.lane_skip[lane]
            _, begin, end = self._blocks(table, lane, position)
            drawn = int(begin[0]) + int(draw * int(end[0] - begin[0]))
            place = int(np.searchsorted(table.starts, drawn, side="right")) - 1
            return int(table.shards[place]), drawn - int(table.starts[place])
        drawn = int(draw * self.num_samples)
        shard = int(np.searchsorted(self._shard_starts, drawn, side="right")) - 1
        return shard, drawn - int(self._shard_starts[shard])

    def blocks(self, start_slot: int, lanes: Collection[int]) -> Iterator[Block]:
        """The blocks that some lanes read from a slot on, without end, in the order of their first slots."""
        assert lanes, "no lanes are nobody's blocks"
        for epoch in itertools.count(start_slot // self.num_samples):
            found = [block for lane in lanes for block in self._lane_blocks(epoch, lane)]
            yield from sorted(
                (block for block in found if block.last_slot >= start_slot), key=lambda block: block.first_slot
            )

    def _lane_blocks(self, epoch: int, lane: int) -> Iterator[Block]:
        table = self._epoch(epoch)
        begin, end = int(table.segments[lane]), int(table.segments[lane + 1])
        if begin == end:
            return
        first_place = int(table.first_place[lane])
        end_place = int(np.searchsorted(table.starts, end, side="left"))
        for place in range(first_place, end_place, self.window):
            places = slice(place, min(place + self.window, end_place))
            first, last = max(int(table.starts[place]), begin), min(int(table.starts[places.stop]), end) - 1
            if first <= last:  # else its shards are all empty
                shards = table.shards[places]
                yield Block(
                    self._slot_at(table, lane, first),
                    self._slot_at(table, lane, last),
                    tuple(shards[self.sizes[shards] > 0].tolist()),
                )

    def _slot_at(self, table: _Epoch, lane: int, position: int) -> int:
        """The slot at which a lane comes to a position of its segment."""
        turns, rest = divmod(position - int(table.segments[lane]) + int(table.lane_skip[lane]), self.lane_block)
        return turns * self.lane_cycle + lane * self.lane_block + rest

    def _slots_before(self, lanes: np.ndarray, slots: np.ndarray | int) -> np.ndarray:
        """How many of the slots in [0, slot) each lane serves, int64."""
        turns, rest = np.divmod(slots, self.lane_cycle)
        return turns * self.lane_block + np.clip(rest - lanes * self.lane_block, 0, self.lane_block)

    def _epoch(self, epoch: int) -> _Epoch:
        """The tables of an epoch, kept for the last few: batches straddle epochs and readers run ahead."""
        table = self._epochs.get(epoch)
        if table is None:
            shards = randomness.permutation(self.seed, randomness.ORDER_SHARDS, len(self.sizes), epoch)
            starts = np.concatenate([[0], np.cumsum(self.sizes[shards])])
            lanes = np.arange(self.lanes)
            lane_skip = self._slots_before(lanes, epoch * self.num_samples)
            counts = self._slots_before(lanes, (epoch + 1) * self.num_samples) - lane_skip
            segments = np.concatenate([[0], np.cumsum(counts)])
            first_place = np.searchsorted(starts, segments[:-1], side="right") - 1
            table = _Epoch(shards, starts, lane_skip, segments, first_place)
            self._epochs[epoch] = table
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return table

    def _blocks(
        self, table: _Epoch, lanes: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each position of a lane: its block's number in the segment, and the block's begin and end."""
        first = table.first_place[lanes]
        block = (np.searchsorted(table.starts, positions, side="right") - 1 - first) // self.window
        begin_place = first + block * self.window
        end_place = np.minimum(begin_place + self.window, len(self.sizes))
        begin = np.maximum(table.starts[begin_place], table.segments[lanes])
        end = np.minimum(table.starts[end_place], table.segments[lanes + 1])
        return block, begin, end

    def _shuffle(self, epoch: int, table: _Epoch, lanes: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The position that each position is sent to by the shuffle of its block, int64 [num_positions]."""
        block, begin, end = self._blocks(table, lanes, positions)
        shuffled = np.empty_like(positions)
        # `begin` is unique among blocks, so the runs of equal `begin` in sorted order are the blocks.
        sort = np.argsort(begin, kind="stable")
        for rows in np.split(sort, np.flatnonzero(np.diff(begin[sort])) + 1):
            if len(rows):
                row = rows[0]
                lane, start = int(lanes[row]), int(begin[row])
                order = self._block_order(epoch, lane, int(block[row]), int(end[row]) - start)
                shuffled[rows] = start + order[positions[rows] - start]
        return shuffled

    def _block_order(self, epoch: int, lane: int, block: int, length: int) -> np.ndarray:
        """The permutation of one block; each lane keeps its latest, since a stream goes block by block."""
        kept = self._shuffles.get(lane)
        if kept is None or kept[0] != (epoch, block):
            order = randomness.permutation(self.seed, randomness.ORDER_BLOCK, length, epoch, lane, block)
            kept = ((epoch, block), order.astype(np.uint32))
            self._shuffles[lane] = kept
        return kept[1]
