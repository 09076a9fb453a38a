"""Every epoch is a permutation, in closed form, whatever the shards, lanes and window."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.reading.order import Order

_ROOT = Path(__file__).resolve().parents[3]

_orders = st.builds(
    Order,
    st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any),
    seed=st.integers(0, 100),
    window=st.integers(1, 4),
    lanes=st.integers(1, 9),
    lane_block=st.integers(1, 4),
)


def _all_samples(order: Order) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, size in enumerate(order.sizes.tolist()) for sample in range(size)]


@given(_orders, st.integers(0, 50))
def test_each_epoch_visits_every_sample_once(order: Order, epoch: int) -> None:
    first = epoch * order.num_samples
    epochs, shards, samples = order.locate(np.arange(first, first + order.num_samples))
    assert set(epochs.tolist()) == {epoch}
    assert sorted(zip(shards.tolist(), samples.tolist(), strict=True)) == _all_samples(order)


@given(_orders, st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_a_slot_depends_on_nothing_that_was_asked_before(order: Order, slots: list[int]) -> None:
    fresh = Order(order.sizes, **order.parameters)
    together = np.stack(order.locate(np.array(slots)), axis=1)
    for slot, found in zip(reversed(slots), together[::-1], strict=True):
        np.testing.assert_array_equal(np.stack(fresh.locate(np.array([slot])), axis=1)[0], found)


@given(_orders)
def test_a_lane_reads_a_contiguous_run_of_shards(order: Order) -> None:
    slots = np.arange(order.num_samples)
    _, shards, _ = order.locate(slots)
    lanes = slots // order.lane_block % order.lanes
    readers = sum(len(np.unique(shards[lanes == lane])) for lane in np.unique(lanes))
    # Only the shards that a segment's end cuts through are read by two lanes or, if small, by more.
    assert readers <= np.count_nonzero(order.sizes) + order.lanes


@given(_orders)
def test_a_block_stays_within_its_window_of_shards(order: Order) -> None:
    slots = np.arange(order.num_samples)
    _, shards, _ = order.locate(slots)
    for lane in range(order.lanes):
        seen = shards[slots // order.lane_block % order.lanes == lane]
        first_use = {int(shard): at for at, shard in reversed(list(enumerate(seen)))}
        last_use = {int(shard): at for at, shard in enumerate(seen)}
        for at in range(len(seen)):
            live = sum(first_use[shard] <= at <= last_use[shard] for shard in first_use)
            assert live <= order.window + np.count_nonzero(order.sizes == 0)


@given(_orders, st.integers(0, 500), st.data())
def test_blocks_tell_ahead_which_shards_each_slot_reads(order: Order, start: int, data: st.DataObject) -> None:
    lanes = data.draw(st.sets(st.integers(0, order.num_lanes - 1), min_size=1))
    end = start + 2 * order.num_samples + order.lane_cycle
    windows = list(itertools.takewhile(lambda block: block.first_slot < end, order.windows(start, lanes)))
    assert windows == sorted(windows, key=lambda block: block.first_slot)
    slots = np.arange(start, end)
    slots = slots[np.isin(order.lanes_of(slots), list(lanes))]
    told: dict[int, set[int]] = {int(slot): set() for slot in slots}
    for block in windows:
        assert len(block.shards) <= order.window and block.last_slot >= start
        for slot in range(max(start, block.first_slot), min(block.last_slot + 1, end)):
            if slot in told:
                told[slot].update(block.shards)
    for slot, shard in zip(slots.tolist(), order.locate(slots)[1].tolist(), strict=True):
        assert shard in told[slot]
    # and nothing is told that is not read
    read = set(order.locate(slots)[1].tolist())
    for block in windows:
        if start <= block.first_slot and block.last_slot < end:
            assert set(block.shards) <= read


def test_seeds_and_epochs_differ() -> None:
    sizes = [50] * 20
    slots = np.arange(1000)
    orders = [Order(sizes, seed).locate(slots + first)[1:] for seed in (0, 1) for first in (0, 1000)]
    assert len({np.stack(order).tobytes() for order in orders}) == 4


@given(_orders, st.integers(0, 10**6), st.integers(0, 20))
def test_substitutes_are_samples_of_the_set(order: Order, slot: int, attempt: int) -> None:
    shard, sample = order.substitute(slot, attempt)
    assert 0 <= sample < order.sizes[shard]
    assert Order(order.sizes, **order.parameters).substitute(slot, attempt) == (shard, sample)


@given(_orders)
def test_lanes_are_joined_until_each_has_a_window(order: Order) -> None:
    asked = order.parameters
    assert order.lanes == 1 or order.lanes * order.window <= len(order.sizes)
    assert order.lanes * order.lane_block == asked["lanes"] * asked["lane_block"]


def test_nothing_to_order_is_an_error() -> None:
    with pytest.raises(ShardError, match="no samples"):
        Order([0, 0], seed=1)
    with pytest.raises(ShardError, match="at least 1"):
        Order([3], seed=1, window=0)


def test_the_order_is_the_same_for_ever() -> None:
    # A change here makes every saved run continue on other images.
    order = Order([2, 1, 3, 1, 2, 3], seed=3, window=2, lanes=4)
    _, shards, samples = order.locate(np.arange(12))
    assert (order.lanes, order.lane_block) == (2, 2)  # joined: three windows are too few for four lanes
    assert shards.tolist() == [5, 5, 4, 0, 2, 5, 0, 4, 2, 2, 1, 3]
    assert samples.tolist() == [1, 2, 0, 0, 0, 0, 1, 1, 2, 1, 0, 0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_a_billion_samples_start_at_once_in_little_memory() -> None:
    program = """
import re, time
from pathlib import Path
import numpy as np
from shards.reading.order import Order
sizes = np.full(170_000, 10_000)
began = time.process_time()
order = Order(sizes, seed=1, lane_block=64)
slot = order.num_samples // 2 // 4096 * 4096
order.locate(np.arange(slot, slot + 16))
first = time.process_time() - began
order.locate(np.arange(slot, slot + 4096))
began = time.process_time()
for step in range(1, 21):
    order.locate(np.arange(slot + 4096 * step, slot + 4096 * step + 512))
# Not ru_maxrss, which begins with the peak of the process that started this one.
peak_kilobytes = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(first, (time.process_time() - began) / 20, peak_kilobytes * 1024)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=_ROOT
    ).stdout
    first_seconds, steady_seconds, rss_bytes = map(float, printed.split())
    # The bounds are 0.1 s, 5 ms and 200 MB; the times are of the processor, and leave room for a slow one.
    assert first_seconds < 0.3
    assert steady_seconds < 0.015
    assert rss_bytes < 200e6
