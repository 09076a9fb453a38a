"""Draws depend only on seed, purpose and counters."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards import randomness


def test_draws_never_change() -> None:
    # a change would alter the order and the augmentations of every saved run
    assert randomness.derive_seed(1, randomness.MODEL, 2) == 8930568934666098634
    np.testing.assert_allclose(
        randomness.uniforms(7, randomness.VIEWS, np.array([0, 10**12]), 2),
        [[0.24430314867245684, 0.39039528878340846], [0.42094204544531133, 0.3559210068589699]],
        rtol=1e-12,
    )
    assert randomness.permutation(3, randomness.ORDER_WINDOW, 8, 1, 2, 3).tolist() == [2, 6, 7, 0, 5, 1, 4, 3]


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_uniforms_equal_the_generator_of_each_slot(seed: int, slots: list[int]) -> None:
    rows = randomness.uniforms(seed, randomness.VIEWS, np.array(slots), 6)
    for row, slot in zip(rows, slots, strict=True):
        np.testing.assert_array_equal(row, randomness.generator(seed, randomness.VIEWS, slot).random(6))
        np.testing.assert_array_equal(row[:3], randomness.uniforms(seed, randomness.VIEWS, np.array([slot]), 3)[0])


def test_purpose_seed_and_counters_each_change_the_draw() -> None:
    draws = {
        randomness.derive_seed(seed, purpose, *counters)
        for seed in (0, 1, -1)
        for purpose in (randomness.VIEWS, randomness.MASKS)
        for counters in ((), (1,), (0, 1), (0, 0, 1), (1, 1))
    }
    assert len(draws) == 3 * 2 * 5


@given(st.integers(0, 300), st.integers(0, 5))
def test_permutation_has_each_number_once(length: int, counter: int) -> None:
    drawn = randomness.permutation(5, randomness.ORDER_WINDOW, length, counter)
    assert sorted(drawn.tolist()) == list(range(length))


def test_permutations_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for counter in range(3000):
        drawn = tuple(randomness.permutation(0, randomness.ORDER_WINDOW, 3, counter).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5  # chi-squared, 5 degrees, p = 0.001
