"""Sudden rises of the loss, by a robust z-score over the preceding steps."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

# values needed for a meaningful median
MIN_VALUES = 20
# standard deviation of a normal distribution in units of its median absolute deviation
_SIGMA = 1.4826
# smallest standard deviation, as a share of the median
_RESOLUTION = 1e-3


class SpikeDetector:
    """Finds values far above the median of the preceding values."""

    def __init__(self, window: int, threshold: float) -> None:
        """``window``: number of preceding values, 0: off; ``threshold``: in robust standard deviations."""
        self._values: deque[float] = deque(maxlen=window)
        self._threshold = threshold
        self._is_above = False

    def add(self, step: int, value: float) -> tuple[float | None, str | None]:
        """Return the z-score of the loss of ``step`` and a warning.

        The score is None while there are too few values. Of several high values in a row, only the first has a warning.
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
