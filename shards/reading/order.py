"""Sample order of the stream: a pure function from (shard sizes, seed, slot) to a sample.

Slot s is the s-th sample ever consumed. With N samples, epoch e is exactly slots [eN, (e+1)N) and visits every sample
once. Three shuffles, without any list of samples:

1. each epoch permutes the shards; their samples, concatenated, form a line of N positions;
2. the line is cut into ``lanes`` contiguous segments, and slot s reads from segment ``(s // lane_block) % lanes``, so
   consecutive slots read distant positions. With ``lane_block = global_batch / lanes``, a rank's contiguous part of a
   batch reads only the shards of its own lanes;
3. a segment is cut into windows of ``window`` shards (clipped at the segment's ends), and each window is shuffled by
   its own permutation.

Shuffle quality relative to a full permutation (displacement and distinct shards: 1 is ideal, correlation: 0), for 1000
shards of 1000 samples, 64 lanes and batches of 256; sets of at most ``window`` shards are permuted in full:

    window   displacement   neighbour correlation   distinct shards per batch
         1           0.98                    0.75                        0.28
         4           0.98                    0.21                        0.76
        16           1.00                    0.07                        0.91
        64           1.00                    0.01                        0.89

Memory: two numbers per shard for each of the last few epochs, plus the permutation of one window for each lane in use
(4 bytes per sample of the window).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shards import randomness
from shards.errors import ShardError

_EPOCHS_KEPT = 3
_NEARBY_ATTEMPTS = 8


@dataclass(frozen=True)
class Window:
    """Shards that are shuffled together, and so in use at the same time."""

    first_slot: int  # first and last slot that read these shards
    last_slot: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class _Epoch:
    """Tables of one epoch: the line of shards and its segments."""

    shards: np.ndarray  # int64 [num_shards]: permuted shards, in the order of the line
    starts: np.ndarray  # int64 [num_shards + 1]: position where each permuted shard begins
    lane_skip: np.ndarray  # int64 [lanes]: slots of the lane before this epoch
    segments: np.ndarray  # int64 [lanes + 1]: position where each lane's segment begins
    first_shard: np.ndarray  # int64 [lanes]: index into ``shards`` where each segment begins


class Order:
    """The order of an endless stream over shards of the given sizes. Pure, and safe to share between threads.

    Lanes reduce the shards that a rank reads, but a lane with fewer shards than a window shuffles badly. With fewer
    than ``lanes * window`` shards, neighbouring lanes are therefore merged until each has a full window.

    Args:
        sizes: samples in each shard.
        window: shards that are shuffled together; more mix better and keep more shards in use at a time.
        lanes: number of contiguous segments, read round-robin.
        lane_block: consecutive slots that one lane serves.

    Attributes:
        lanes, lane_block: values after merging; their product is unchanged.
        lane_cycle: slots after which the sequence of lanes repeats.
        parameters: define the order together with the shard sizes; a saved stream must match all of them.

    Raises:
        ShardError: there are no samples, or ``window``, ``lanes`` or ``lane_block`` is below 1.
    """

    def __init__(
        self, sizes: Sequence[int] | np.ndarray, seed: int, window: int = 16, lanes: int = 64, lane_block: int = 1
    ) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        if self.num_samples == 0:
            raise ShardError("the shard set has no samples; pack some images first")
        if window < 1 or lanes < 1 or lane_block < 1:
            raise ShardError(f"window ({window}), lanes ({lanes}) and lane_block ({lane_block}) must all be at least 1")
        self.seed, self.window = seed, window
        self.parameters = {"seed": seed, "window": window, "lanes": lanes, "lane_block": lane_block}
        max_lanes = max(1, len(self.sizes) // window)
        self.lanes = max(divisor for divisor in range(1, min(lanes, max_lanes) + 1) if lanes % divisor == 0)
        self.lane_block = lane_block * lanes // self.lanes
        self.lane_cycle = self.lanes * self.lane_block
        self._shard_starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        # lane -> ((epoch, window), permutation)
        self._shuffles: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def lanes_of(self, slots: np.ndarray) -> np.ndarray:
        """Return the lane that serves each slot, int64 [num_slots]."""
        return np.asarray(slots, dtype=np.int64) // self.lane_block % self.lanes

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard and the sample in it at each slot, int64 [num_slots]; slots may be in any order."""
        slots = np.asarray(slots, dtype=np.int64)
        epochs = slots // self.num_samples
        lanes = self.lanes_of(slots)
        shards, samples = np.empty_like(slots), np.empty_like(slots)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            table = self._epoch(int(epoch))
            position = self._positions(table, lanes[rows], slots[rows])
            shuffled = self._shuffle(int(epoch), table, lanes[rows], position)
            shards[rows], samples[rows] = _find_sample(table.starts, shuffled, table.shards)
        return shards, samples

    def substitute(self, slot: int, attempt: int) -> tuple[int, int]:
        """Return the replacement (shard, sample) for the unusable sample of a slot; depends only on the arguments.

        The first attempts draw from the slot's own window, whose shards are in use anyway, later ones from all shards.
        """
        draw = float(randomness.generator(self.seed, randomness.SUBSTITUTE, slot, attempt).random())
        if attempt < _NEARBY_ATTEMPTS:
            table = self._epoch(slot // self.num_samples)
            lane = self.lanes_of(np.array([slot]))
            _, begin, end = self._window_bounds(table, lane, self._positions(table, lane, np.array([slot])))
            position = int(begin[0]) + int(draw * int(end[0] - begin[0]))
            shard, sample = _find_sample(table.starts, np.array(position), table.shards)
        else:
            position = int(draw * self.num_samples)
            shard, sample = _find_sample(self._shard_starts, np.array(position), np.arange(len(self.sizes)))
        return int(shard), int(sample)

    def windows(self, start_slot: int, lanes: Collection[int]) -> Iterator[Window]:
        """Yield the windows that the given lanes read from ``start_slot`` on, endlessly, sorted by first slot."""
        assert lanes, "at least one lane is needed"
        for epoch in itertools.count(start_slot // self.num_samples):
            windows = [window for lane in lanes for window in self._lane_windows(epoch, lane)]
            windows.sort(key=lambda window: window.first_slot)
            yield from (window for window in windows if window.last_slot >= start_slot)

    def _lane_windows(self, epoch: int, lane: int) -> Iterator[Window]:
        table = self._epoch(epoch)
        begin, end = int(table.segments[lane]), int(table.segments[lane + 1])
        if begin == end:
            return
        end_shard = int(np.searchsorted(table.starts, end, side="left"))
        for start in range(int(table.first_shard[lane]), end_shard, self.window):
            stop = min(start + self.window, end_shard)
            first, last = max(int(table.starts[start]), begin), min(int(table.starts[stop]), end) - 1
            if first <= last:  # otherwise all its shards are empty
                shards = table.shards[start:stop]
                used = tuple(shards[self.sizes[shards] > 0].tolist())
                yield Window(self._slot_at(table, lane, first), self._slot_at(table, lane, last), used)

    def _slot_at(self, table: _Epoch, lane: int, position: int) -> int:
        """Return the slot at which a lane reaches a position of its segment."""
        turns, rest = divmod(position - int(table.segments[lane]) + int(table.lane_skip[lane]), self.lane_block)
        return turns * self.lane_cycle + lane * self.lane_block + rest

    def _positions(self, table: _Epoch, lanes: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Return the position on the line of each slot before the shuffle, int64 [num_slots]."""
        return table.segments[lanes] + self._slots_before(lanes, slots) - table.lane_skip[lanes]

    def _slots_before(self, lanes: np.ndarray, slots: np.ndarray | int) -> np.ndarray:
        """Return how many of the slots in [0, slot) each lane serves, int64."""
        turns, rest = np.divmod(slots, self.lane_cycle)
        return turns * self.lane_block + np.clip(rest - lanes * self.lane_block, 0, self.lane_block)

    def _epoch(self, epoch: int) -> _Epoch:
        """Return the tables of an epoch; the last few are kept, as batches straddle epochs and readers run ahead."""
        table = self._epochs.get(epoch)
        if table is None:
            shards = randomness.permutation(self.seed, randomness.ORDER_SHARDS, len(self.sizes), epoch)
            starts = np.concatenate([[0], np.cumsum(self.sizes[shards])])
            lanes = np.arange(self.lanes)
            lane_skip = self._slots_before(lanes, epoch * self.num_samples)
            counts = self._slots_before(lanes, (epoch + 1) * self.num_samples) - lane_skip
            segments = np.concatenate([[0], np.cumsum(counts)])
            first_shard = np.searchsorted(starts, segments[:-1], side="right") - 1
            table = _Epoch(shards, starts, lane_skip, segments, first_shard)
            self._epochs[epoch] = table
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return table

    def _window_bounds(
        self, table: _Epoch, lanes: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each position's window: its number in the segment, and its first and end position."""
        first = table.first_shard[lanes]
        window = (np.searchsorted(table.starts, positions, side="right") - 1 - first) // self.window
        begin_shard = first + window * self.window
        end_shard = np.minimum(begin_shard + self.window, len(self.sizes))
        begin = np.maximum(table.starts[begin_shard], table.segments[lanes])
        end = np.minimum(table.starts[end_shard], table.segments[lanes + 1])
        return window, begin, end

    def _shuffle(self, epoch: int, table: _Epoch, lanes: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return the shuffled position of each position, int64 [num_positions]."""
        window, begin, end = self._window_bounds(table, lanes, positions)
        shuffled = np.empty_like(positions)
        # `begin` is unique among windows, so runs of equal `begin` in sorted order are the windows
        sort = np.argsort(begin, kind="stable")
        for rows in np.split(sort, np.flatnonzero(np.diff(begin[sort])) + 1):
            if len(rows):
                row = rows[0]
                lane, start = int(lanes[row]), int(begin[row])
                order = self._permutation(epoch, lane, int(window[row]), int(end[row]) - start)
                shuffled[rows] = start + order[positions[rows] - start]
        return shuffled

    def _permutation(self, epoch: int, lane: int, window: int, length: int) -> np.ndarray:
        """Return the permutation of one window; each lane keeps its latest, as a stream reads window by window."""
        kept = self._shuffles.get(lane)
        if kept is None or kept[0] != (epoch, window):
            order = randomness.permutation(self.seed, randomness.ORDER_WINDOW, length, epoch, lane, window)
            kept = ((epoch, window), order.astype(np.uint32))
            self._shuffles[lane] = kept
        return kept[1]


def _find_sample(starts: np.ndarray, positions: np.ndarray, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shard at each position of a line, and the sample in it; ``starts`` are the shards' first positions."""
    index = np.searchsorted(starts, positions, side="right") - 1
    return shards[index], positions - starts[index]
