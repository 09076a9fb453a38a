"""Sudden rises of the loss, by a robust z-score over the preceding steps."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

# below this number of values a median says little
MIN_VALUES = 20
# standard deviation of a normal distribution in units of its median absolute deviation
_SIGMA = 1.4826
# differences below this share of the median are not significant, however constant the preceding values are
_RESOLUTION = 1e-3


class SpikeDetector:
    """Finds values far above the median of the preceding values."""

    def __init__(self, window: int, threshold: float) -> None:
        """``window``: preceding values compared with; 0 disables it. ``threshold``: in robust standard deviations."""
        self._values: deque[float] = deque(maxlen=window)
        self._threshold = threshold
        self._is_above = False

    def add(self, step: int, value: float) -> tuple[float | None, str | None]:
        """Return the z-score of the loss of ``step`` and a warning.

        The score is None while there are too few values; the warning is None except at the first of several high
        values in a row.
        """
        score = None
        if math.isfinite(value):
            if len(self._values) >= MIN_VALUES:
                centre = median(self._values)
                deviation = median(abs(other - centre) for other in self._values)
                score = (value - centre) / max(_SIGMA * deviation, _RESOLUTION * abs(centre), 1e-12)
            self._values.append(value)
        was_above, self._is_above = self._is_above, score is not None and score > self._threshold
        if was_above or not self._is_above:
            return score, None
        return score, (
            f"step {step}: the loss {value:.4g} is {score:.1f} robust standard deviations above the median of the "
            "preceding steps"
        )
