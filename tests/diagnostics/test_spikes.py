from __future__ import annotations

import math
from random import Random

from streamtrain.diagnostics.spikes import MIN_VALUES, SpikeDetector


def test_a_spike_is_reported_once_and_ordinary_noise_is_not() -> None:
    draw, detector = Random(0), SpikeDetector(window=100, threshold=10.0)
    warnings = []
    for step in range(1000):
        # a slowly falling loss with noise and two spikes
        loss = 10 - step / 500 + draw.gauss(0, 0.05) + (3.0 if 500 <= step < 505 or step == 700 else 0.0)
        score, line = detector.add(step, loss)
        assert (score is None) == (step < MIN_VALUES)
        if line:
            warnings.append((step, line))
    assert [step for step, _ in warnings] == [500, 700]
    assert warnings[0][1].startswith("step 500: the loss 12")
    assert warnings[0][1].endswith("above the median of the preceding steps")


def test_non_finite_values_have_no_score_and_do_not_affect_the_median() -> None:
    detector = SpikeDetector(window=50, threshold=5.0)
    for step in range(30):
        detector.add(step, 2.0)
    assert detector.add(30, math.nan) == detector.add(31, math.inf) == (None, None)
    # without any deviation, 0.1% of the median counts as one
    assert math.isclose(detector.add(32, 2.002)[0] or 0.0, 1.0, rel_tol=1e-6)
    disabled = SpikeDetector(window=0, threshold=5.0)
    assert [disabled.add(step, float(step)) for step in range(50)] == [(None, None)] * 50
