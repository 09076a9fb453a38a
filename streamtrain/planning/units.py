"""Sizes, times and numbers in words, with three significant digits."""

from __future__ import annotations

import math

_BYTES = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_SECONDS = ((86_400.0, 2.0, "days"), (3600.0, 1.0, "h"), (60.0, 2.0, "min"))


def significant(value: float) -> str:
    """Format a number with three significant digits, without an exponent: ``0.0421``, ``3.21``, ``1,290``."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    # rounding up may add a digit: 9.999 is 10.0
    decimals = 2 - math.floor(math.log10(abs(round(value, decimals))))
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def size(num_bytes: float) -> str:
    """Format bytes with a decimal unit: ``3.21 GB``."""
    for factor, unit in _BYTES:
        # 999.9 MB would round to 1,000 MB
        if abs(num_bytes) >= 0.9995 * factor:
            return f"{significant(num_bytes / factor)} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Format a time: ``0.0421 s``, ``12.4 min``, ``3.10 h``, ``2.84 days``."""
    for factor, least, unit in _SECONDS:
        if seconds >= least * factor:
            return f"{significant(seconds / factor)} {unit}"
    return f"{significant(seconds)} s"
