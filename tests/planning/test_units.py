"""Numbers have three significant digits at every size."""

from __future__ import annotations

import pytest

from streamtrain.planning.units import duration, significant, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (0.042149, "0.0421"), (3.2149, "3.21"), (9.996, "10.0"), (99.96, "100"), (123.4, "123"),
        (1286.0, "1,290"), (-1.784, "-1.78"), (0.00099996, "0.00100"),
    ],
)  # fmt: skip
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_784_000_000, "1.78 GB"), (999_700_000, "1.00 GB"), (268e6, "268 MB"),
     (1.46e12, "1.46 TB")],
)  # fmt: skip
def test_sizes_have_a_unit_that_keeps_them_below_a_thousand(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0421, "0.0421 s"), (59.96, "60.0 s"), (3000.0, "50.0 min"), (10_800.0, "3.00 h"), (2_047_680.0, "23.7 days")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
