"""The ``schedules`` section, and the value of a schedule at a step."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import model_validator

from streamtrain.config.section import Section, Steps, accept


class Schedule(Section):
    """A value that changes with the step; a bare number is a constant.

    ``start`` for ``delay`` steps, then linear warm-up to ``peak`` over ``warmup`` steps, then ``kind`` towards ``end``.
    """

    kind: Literal["constant", "linear", "cosine"] = accept(
        "constant", "Shape after the warm-up: stay at peak, or move to end by the last step of the run."
    )
    start: float | None = accept(None, "Value during the delay and at the first step of the warm-up; null: 0.")
    peak: float = accept(..., "Value after the warm-up.")
    end: float | None = accept(None, "Value at the last step (linear and cosine only).")
    delay: Steps = accept(0, "Steps before the warm-up.")
    warmup: Steps = accept(0, "Steps of the warm-up.")
    tail: Steps = accept(0, "Steps at the end of the run with the value end (linear and cosine only).")

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, raw: Any) -> Any:
        if isinstance(raw, dict | cls):
            return raw
        try:
            return {"peak": float(raw)}
        except (TypeError, ValueError):
            raise ValueError("must be a number or a schedule {kind, peak, ...}") from None

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> Schedule:
        if self.kind == "constant" and (self.end is not None or self.tail):
            raise ValueError("a constant schedule has neither end nor tail; choose kind: cosine or linear")
        if self.start is not None and not self.delay + self.warmup:
            raise ValueError("start has an effect only with a warmup or a delay")
        if self.kind != "constant" and self.end is None:
            raise ValueError(f"a {self.kind} schedule needs its end value")
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """The values between which it moves."""
        start = [self.start or 0.0] if self.delay + self.warmup else []
        return (*start, self.peak, *([] if self.end is None else [self.end]))

    @property
    def is_ever_positive(self) -> bool:
        return max(self.peak, self.end or 0.0, self.start or 0.0) > 0.0


def value_at(schedule: Schedule, step: int, num_steps: int) -> float:
    """Return the value of ``schedule`` at ``step`` (from 0) of a run of ``num_steps`` steps.

    The first step of the warm-up has the value ``start``, and the first step after the warm-up has ``peak``. The last
    ``tail`` steps have the value ``end``, and steps past the run keep the last value.
    """
    ramp_end, start = schedule.delay + schedule.warmup, schedule.start or 0.0
    if step < ramp_end:
        ramp_step = max(0, step - schedule.delay)
        return start + (schedule.peak - start) * ramp_step / schedule.warmup if ramp_step else start
    if schedule.end is None:
        return schedule.peak
    # the last step before the tail has the value `end`
    span = num_steps - schedule.tail - ramp_end - 1
    progress = min(1.0, (step - ramp_end) / span) if span > 0 else 1.0
    fraction = {"linear": progress, "cosine": 0.5 - 0.5 * math.cos(math.pi * progress)}[schedule.kind]
    return schedule.peak + (schedule.end - schedule.peak) * fraction


class SchedulesConfig(Section):
    """Values that change with the step. Each is a number (constant) or a schedule."""

    lr: Schedule = accept(
        Schedule(kind="cosine", peak=1e-3, end=1e-6, warmup=100),
        "Learning rate, before optim.lr_scaling and layer-wise factors.",
    )
    weight_decay: Schedule = accept(
        Schedule(kind="cosine", peak=0.04, end=0.4), "Weight decay; biases, norms and LayerScale have none."
    )
    momentum: Schedule = accept(Schedule(kind="cosine", peak=0.992, end=1.0), "Momentum of the EMA teacher.")
    teacher_temperature: Schedule = accept(
        Schedule(start=0.04, peak=0.07, warmup=300), "Temperature of the teacher's targets."
    )
    freeze_last_layer: Steps = accept(0, "First steps of the run in which the prototypes have learning rate 0.")

    @model_validator(mode="after")
    def _check_values(self) -> SchedulesConfig:
        bounds = {"lr": (0.0, math.inf), "weight_decay": (0.0, math.inf), "momentum": (0.0, 1.0)}
        for name, (low, high) in bounds.items():
            if wrong := [value for value in getattr(self, name).values if not low <= value <= high]:
                limit = f"within [{low:g}, {high:g}]" if high < math.inf else f"at least {low:g}"
                raise ValueError(f"{name} has the value {wrong[0]:g}; it must be {limit}")
        if wrong := [value for value in self.teacher_temperature.values if value <= 0.0]:
            raise ValueError(f"teacher_temperature has the value {wrong[0]:g}; it must be above 0")
        return self
