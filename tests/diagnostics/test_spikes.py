from __future__ import annotations

import math
from random import Random

from streamtrain.diagnostics.spikes import LEAST, Spikes


def test_a_spike_is_told_once_and_ordinary_noise_is_not() -> None:
    draw, spikes = Random(0), Spikes(window=100, threshold=10.0)
    told = []
    for step in range(1000):
        # a loss that falls slowly, with noise; and two outbreaks
        loss = 10 - step / 500 + draw.gauss(0, 0.05) + (3.0 if 500 <= step < 505 or step == 700 else 0.0)
        score = spikes.score(loss)
        assert (score is None) == (step < LEAST)
        if line := spikes.warning(step, loss, score):
            told.append((step, line))
    assert [step for step, _ in told] == [500, 700]
    assert told[0][1].startswith("step 500: the loss 12")
    assert told[0][1].endswith("above the median of the steps before")


def test_what_is_not_finite_has_no_score_and_leaves_the_median_alone() -> None:
    spikes = Spikes(window=50, threshold=5.0)
    for _ in range(30):
        spikes.score(2.0)
    assert spikes.score(math.nan) is None and spikes.score(math.inf) is None
    # without any deviation at all, a tenth of a percent of the median counts as one
    assert math.isclose(spikes.score(2.002) or 0.0, 1.0, rel_tol=1e-6)
    never = Spikes(window=0, threshold=5.0)
    assert [never.score(value) for value in range(50)] == [None] * 50
