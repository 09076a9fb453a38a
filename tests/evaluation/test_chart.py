from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.evaluation.chart import Line, charts_of, label, line_chart, smooth, ticks


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e6))
def test_ticks_are_few_and_lie_within(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high, 4)
    if span / max(abs(low), 1) > 1e-9:
        assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in found)


def test_smoothing_keeps_lines_straight_and_length() -> None:
    straight = np.linspace(3.0, -2.0, 500)
    np.testing.assert_allclose(smooth(straight), straight, atol=1e-9)
    noise = np.random.default_rng(0).normal(size=500)
    assert smooth(noise)[50:-50].std() < 0.4
    assert smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


def test_charts_survive_what_runs_log() -> None:
    records = [{"step": step, "a": value} for step, value in enumerate([None, 1.0, math.pi, None, 2.0])]
    assert len(charts_of({"run": records, "empty": []}, ["a", "missing"])) == 1
    nothing = line_chart("nothing", [Line("run", np.array([1]), np.array([math.nan]))])
    flat = line_chart("flat", [Line("run", np.array([7]), np.array([0.0]))], width=300, height=200)
    assert nothing.size == (840, 480) and flat.size == (600, 400)


def test_numbers_are_short() -> None:
    assert [label(value) for value in (0, 0.25, 12_000, 3e-5, -1.5e6)] == ["0", "0.25", "12k", "3.0e-05", "-1.5M"]
