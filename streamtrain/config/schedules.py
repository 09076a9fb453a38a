"""Values that change with the step; their evaluation is ``streamtrain.config.values``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from streamtrain.config.section import Section, Steps


class Schedule(Section):
    """``start`` for ``delay`` steps, linear warm-up to ``peak`` over ``warmup``, then ``kind`` towards ``end``.

    ``constant`` stays at ``peak``; ``linear`` and ``cosine`` reach ``end`` at the run's last step
    (or ``tail`` steps before it, and stay there). A bare number is a constant. Lengths may be in epochs.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    # null: 0
    start: float | None = None
    peak: float
    end: float | None = None
    delay: Steps = 0
    warmup: Steps = 0
    tail: Steps = 0

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
    def _end_only_where_reached(self) -> Schedule:
        if self.kind == "constant" and (self.end is not None or self.tail):
            raise ValueError("a constant schedule has neither end nor tail; choose kind: cosine or linear")
        if self.start is not None and not self.delay + self.warmup:
            raise ValueError("start has an effect only with a warmup or a delay")
        if self.kind != "constant" and self.end is None:
            raise ValueError(f"a {self.kind} schedule needs its end value")
        return self

    @property
    def ever_positive(self) -> bool:
        """Whether the value is above 0 at any time."""
        return max(self.peak, self.end or 0.0, self.start or 0.0) > 0.0


class SchedulesConfig(Section):
    """``schedules``: all of it affects results. Each is a number (constant) or a schedule."""

    lr: Schedule = Schedule(kind="cosine", peak=1e-3, end=1e-6, warmup=100)
    weight_decay: Schedule = Schedule(kind="cosine", peak=0.04, end=0.4)
    # EMA momentum of the teacher
    momentum: Schedule = Schedule(kind="cosine", peak=0.992, end=1.0)
    teacher_temperature: Schedule = Schedule(start=0.04, peak=0.07, warmup=300)
    # lr of the prototypes is 0 for so many first steps
    freeze_last_layer: Steps = 0
