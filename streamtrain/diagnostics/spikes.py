"""Sudden rises of the loss, by a robust z-score over the steps before."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

# below so many values a median says little
LEAST = 20
# a normal distribution's standard deviation is that much of its median absolute deviation
_SIGMA = 1.4826
# differences below this share of the median are no news, however steady the values were before
_RESOLUTION = 1e-3


class Spikes:
    """Tells a value that is far above the median of the values before it."""

    def __init__(self, window: int, threshold: float) -> None:
        """``window``: values looked back on; 0 for never. ``threshold``: in robust standard deviations."""
        self._values: deque[float] = deque(maxlen=window)
        self._threshold = threshold
        self._above = False

    def score(self, value: float) -> float | None:
        """How many robust standard deviations ``value`` is above the median; None as long as there are too few."""
        score = None
        if len(self._values) >= LEAST and math.isfinite(value):
            centre = median(self._values)
            deviation = median(abs(other - centre) for other in self._values)
            score = (value - centre) / max(_SIGMA * deviation, _RESOLUTION * abs(centre), 1e-12)
        if math.isfinite(value):
            self._values.append(value)
        return score

    def warning(self, step: int, value: float, score: float | None) -> str | None:
        """What to tell of a step with this loss; of several high ones in a row, only the first is told."""
        before, self._above = self._above, score is not None and score > self._threshold
        if before or not self._above:
            return None
        return (
            f"step {step}: the loss {value:.4g} is {score:.1f} robust standard deviations above the median of the "
            "steps before"
        )
