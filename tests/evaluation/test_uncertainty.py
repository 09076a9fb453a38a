"""The stated 95 % intervals cover the truth in about 95 % of repetitions."""

from __future__ import annotations

import numpy as np
import pytest

from streamtrain.evaluation.uncertainty import (
    RESAMPLES,
    accuracy_margin,
    bootstrap,
    bootstrap_margin,
    difference_margin,
    paired_difference,
)


@pytest.mark.parametrize(("truth", "count"), [(0.5, 30), (0.1, 40), (0.97, 100), (0.54, 168), (0.4, 4000)])
def test_the_margin_covers_the_true_accuracy(truth: float, count: int) -> None:
    accuracies = np.random.default_rng(0).binomial(count, truth, 4000) / count
    covered = [abs(accuracy - truth) <= accuracy_margin(accuracy, count) for accuracy in accuracies]
    # more often near 0 and 1, where the interval is not symmetric
    assert np.mean(covered) >= 0.93
    if 0.3 < truth < 0.7:
        assert np.mean(covered) <= 0.98


def test_margins_are_those_of_a_binomial_and_never_zero() -> None:
    # 1.96 * sqrt(p (1 - p) / n)
    assert accuracy_margin(0.5, 1000) == pytest.approx(0.031, abs=2e-4)
    assert difference_margin(0.5, 0.5, 1000) == pytest.approx(0.0438, abs=3e-4)
    assert accuracy_margin(1.0, 8) == accuracy_margin(0.0, 8) == pytest.approx(0.324, abs=1e-3)


@pytest.mark.parametrize("gain", [0.0, 0.05])
def test_the_paired_margin_covers_the_true_difference_and_is_narrower(gain: float) -> None:
    rng, count = np.random.default_rng(1), 500
    covered, margins = [], []
    for _ in range(2000):
        # both fail on the same hard images, and disagree at random on a tenth of the others
        difficulty = rng.random(count)
        first = difficulty + 0.1 * (rng.random(count) - 0.5) < 0.6 + gain
        second = difficulty + 0.1 * (rng.random(count) - 0.5) < 0.6
        difference, margin = paired_difference(first, second)
        assert difference == pytest.approx(first.mean() - second.mean())
        covered.append(abs(difference - gain) <= margin)
        margins.append(margin)
    assert 0.93 <= np.mean(covered) <= 0.99
    assert np.mean(margins) < 0.6 * difference_margin(0.6, 0.6, count)


def test_equal_predictions_still_have_a_margin() -> None:
    same = np.ones(40, bool)
    difference, margin = paired_difference(same, same)
    assert difference == 0.0 and 0 < margin < 0.1
    assert paired_difference(same, ~same)[0] == 1.0


def test_the_bootstrap_has_the_margin_of_a_mean_and_pairs_its_draws() -> None:
    sums = (np.random.default_rng(3).random((400, 1)) < 0.3).astype(float)

    def share(totals: np.ndarray) -> np.ndarray:
        return totals[..., 0] / 400

    scores = bootstrap(sums, share)
    assert scores.shape == (RESAMPLES,) and scores.mean() == pytest.approx(share(sums.sum(0)), abs=0.01)
    assert bootstrap_margin(scores) == pytest.approx(accuracy_margin(float(share(sums.sum(0))), 400), rel=0.1)
    # the difference to a network that is a little better on every image is certain
    assert bootstrap_margin(bootstrap(sums + 0.1, share) - scores) < 1e-9
