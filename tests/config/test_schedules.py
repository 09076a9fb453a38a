"""Values of schedules at given steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtrain.config.schedules import Schedule, value_at


def test_warm_up_then_cosine_to_the_last_step() -> None:
    schedule = Schedule(kind="cosine", start=0.0, peak=1.0, end=0.1, warmup=10)
    values = [value_at(schedule, step, 101) for step in range(101)]
    assert values[:11] == pytest.approx([step / 10 for step in range(11)])
    assert values[55] == pytest.approx(0.55) and values[-1] == pytest.approx(0.1)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_a_tail_keeps_the_end_value() -> None:
    schedule = Schedule(kind="linear", peak=1.0, end=0.0, tail=5)
    assert [value_at(schedule, step, 10) for step in (0, 2, 4, 7, 9, 50)] == [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_a_number_is_a_constant_schedule() -> None:
    assert value_at(Schedule.model_validate("3e-4"), 17, 20) == 3e-4


def test_a_delay_keeps_the_start_value_and_shifts_the_warm_up() -> None:
    schedule = Schedule(start=1.0, peak=3.0, delay=4, warmup=2)
    assert [value_at(schedule, step, 9) for step in range(9)] == [1, 1, 1, 1, 1, 2, 3, 3, 3]
    switch = Schedule(peak=2.0, delay=3)
    assert [value_at(switch, step, 9) for step in range(5)] == [0, 0, 0, 2, 2]
    assert switch.is_ever_positive and not Schedule(peak=0.0).is_ever_positive


@given(
    st.sampled_from(["linear", "cosine"]),
    st.integers(0, 9),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(1, 60),
    st.integers(0, 200),
    st.floats(-1, 1),
    st.floats(-1, 1),
)
def test_values_stay_between_start_peak_and_end(
    kind: str, delay: int, warmup: int, tail: int, steps: int, step: int, peak: float, end: float
) -> None:
    start = peak if delay + warmup else None
    schedule = Schedule(kind=kind, start=start, peak=peak, end=end, delay=delay, warmup=warmup, tail=tail)
    assert min(peak, end) - 1e-9 <= value_at(schedule, step, steps) <= max(peak, end) + 1e-9


@pytest.mark.parametrize(
    "raw", [{"peak": 1, "end": 0}, {"kind": "cosine", "peak": 1}, {"peak": "high"}, "x", {"peak": 1, "start": 2}]
)
def test_invalid_schedules_are_rejected(raw: object) -> None:
    with pytest.raises(ValueError):
        Schedule.model_validate(raw)
