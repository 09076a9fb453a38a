"""Mixtures have exact proportions in every cycle, and each member has its own epochs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from drawn_images import overwrite, packed_set
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.reading.mixture import JoinedSet, Mixture, build_order, open_sets
from shards.reading.quarantine import Quarantine
from shards.reading.shard_set import ShardSet
from shards.reading.source import Source

_SIZES = ([4, 0, 5], [7], [3, 3])


@st.composite
def _mixtures(draw: st.DrawFn) -> Mixture:
    weights = draw(st.lists(st.floats(1, 10), min_size=3, max_size=3))
    return Mixture(
        _SIZES,
        weights,
        cycle=draw(st.integers(40, 60)),
        seed=draw(st.integers(0, 9)),
        window=2,
        lanes=draw(st.integers(1, 9)),
        lane_block=draw(st.integers(1, 20)),
    )


@given(_mixtures(), st.integers(0, 1000))
def test_cycles_have_exact_and_their_parts_near_exact_proportions(mixture: Mixture, cycle: int) -> None:
    first = cycle * mixture.cycle
    members, _ = mixture.member_slots(np.arange(first, first + 2 * mixture.cycle))
    assert np.bincount(members[: mixture.cycle], minlength=3).tolist() == list(mixture.counts)
    shares = np.array(mixture.counts) / mixture.cycle
    for member, share in enumerate(shares):
        ahead = np.concatenate([[0.0], np.cumsum((members == member) - share)])
        # in any interval, the count of a member is within three of its share
        assert ahead.max() - ahead.min() < 3


@settings(max_examples=20)
@given(_mixtures())
def test_members_have_their_own_epochs(mixture: Mixture) -> None:
    slots = np.arange(15 * mixture.cycle)
    members, own = mixture.member_slots(slots)
    shards, samples = mixture.locate(slots)
    first_shard = 0
    for member, sizes in enumerate(_SIZES):
        rows = members == member
        assert own[rows].tolist() == list(range(rows.sum()))
        everything = [(first_shard + shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]
        for epoch in range(3):
            in_epoch = rows & (own // sum(sizes) == epoch)
            assert sorted(zip(shards[in_epoch].tolist(), samples[in_epoch].tolist(), strict=True)) == everything
        for slot in slots[rows][:5]:
            assert mixture.substitute(int(slot), 0) in everything
        first_shard += len(sizes)


def test_slots_do_not_depend_on_earlier_calls() -> None:
    mixture = Mixture(_SIZES, [3, 1, 1], cycle=20, seed=4)
    whole = np.stack(mixture.locate(np.arange(2000)))
    fresh = Mixture(_SIZES, [3, 1, 1], cycle=20, seed=4)
    np.testing.assert_array_equal(np.stack(fresh.locate(np.arange(1500, 1600))), whole[:, 1500:1600])


@settings(max_examples=50)
@given(_mixtures(), st.integers(0, 200), st.data())
def test_windows_list_the_shards_of_each_slot(mixture: Mixture, start: int, data: st.DataObject) -> None:
    lanes = data.draw(st.sets(st.integers(0, mixture.lanes - 1), min_size=1))
    slots = np.arange(start, start + 2 * mixture.cycle)
    windows = list(itertools.takewhile(lambda window: window.first_slot <= slots[-1], mixture.windows(start, lanes)))
    shards, _ = mixture.locate(slots)
    for slot, shard, lane in zip(slots.tolist(), shards.tolist(), mixture.lanes_of(slots).tolist(), strict=True):
        if lane in lanes:
            assert any(window.first_slot <= slot <= window.last_slot and shard in window.shards for window in windows)
    np.testing.assert_array_equal(mixture.lanes_of(slots), mixture.lanes_of(slots + mixture.lane_cycle))


def test_invalid_weights_are_refused() -> None:
    with pytest.raises(ShardError, match="above 0"):
        Mixture(_SIZES, [1, 0, 1], cycle=10, seed=0)
    with pytest.raises(ShardError, match="below one of the 10 slots per cycle"):
        Mixture(_SIZES, [1, 0.001, 1], cycle=10, seed=0)


def test_images_come_from_the_right_member(tmp_path: Path) -> None:
    members = [packed_set(tmp_path / "a", 20), packed_set(tmp_path / "b", 9, ("x", "y"))]
    joined = JoinedSet(members, [2, 1])
    mixture = Mixture([member.sizes for member in members], [2, 1], cycle=6, seed=1)
    source = Source(joined, mixture, threads=2)
    batch = next(source.batches([np.arange(12)]))
    source.close()
    from_first = batch.shards < len(members[0].sizes)
    assert from_first.sum() == 8
    assert (batch.labels[from_first] == -1).all()
    assert (batch.labels[~from_first] >= 0).all()
    assert joined.num_samples == 29
    last = len(members[0].sizes)
    assert joined.name(last) == "1/000000.tar"
    assert joined.read(last, 2) == members[1].read(0, 2)
    assert joined.key(last, 2) == members[1].key(0, 2)


def test_digest_depends_on_sets_and_shares(tmp_path: Path) -> None:
    locations = [str(packed_set(tmp_path / name, count).path) for name, count in (("a", 5), ("b", 6))]
    assert open_sets([(locations[0], 7.0)]).digest == ShardSet.open(locations[0]).digest

    def digest(first: float, second: float, order: int = 1) -> str:
        return open_sets(list(zip(locations, (first, second), strict=True))[::order]).digest

    assert digest(1, 3) == digest(10, 30)
    assert len({digest(1, 3), digest(1, 2), digest(1, 3, -1)}) == 3


@pytest.mark.parametrize("lane_block", [1, 7, 5000])
def test_shares_are_accurate_to_a_thousandth(tmp_path: Path, lane_block: int) -> None:
    location = str(packed_set(tmp_path, 5).path)
    order = build_order(open_sets([(location, 0.7), (location, 0.299), (location, 0.001)]), 0, 2, 4, lane_block)
    assert isinstance(order, Mixture) and order.cycle % (4 * lane_block) == 0
    np.testing.assert_allclose(np.array(order.counts) / order.cycle, [0.7, 0.299, 0.001], atol=1e-3)
    with pytest.raises(ShardError, match="remove that set"):
        build_order(open_sets([(location, 1), (location, 1e-6)]), 0, 2, 4, lane_block)


def test_unusable_images_are_logged_with_their_member_and_stay_replaced(tmp_path: Path) -> None:
    members = [packed_set(tmp_path / name, 30) for name in ("a", "b")]
    overwrite(members[1], 0, 3, b"damage", skip=50)
    joined = open_sets([(str(member.path), weight) for member, weight in zip(members, (1, 2), strict=True)])
    log = tmp_path / "quarantine.jsonl"

    def samples() -> list[tuple[int, int]]:
        source = Source(joined, build_order(joined, 1, 2, 4, 1), threads=2, quarantine=Quarantine(log, max_rate=1.0))
        batch = next(source.batches([np.arange(45)]))
        row = int(np.flatnonzero(batch.shards < len(members[0].sizes))[0])
        batch = source.replace(batch, row, "does not decode")
        source.close()
        return list(zip(batch.shards.tolist(), batch.samples.tolist(), strict=True))

    first = samples()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(entry["shard"][:2], entry["stage"]) for entry in entries} == {("1/", "read"), ("0/", "decode")}
    assert {(entry["shard"], entry["index"]) for entry in entries if entry["stage"] == "read"} == {("1/000000.tar", 3)}
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if '"read"' in line))
    assert samples() == first
