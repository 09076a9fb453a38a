"""Pure functions from the step to a value."""

from __future__ import annotations

import math

from streamtrain.config.schedules import Schedule


def value_at(schedule: Schedule, step: int, num_steps: int) -> float:
    """Value of ``schedule`` at ``step`` (from 0) of a run of ``num_steps`` steps.

    The warm-up's first step has the value ``start`` and the step after it ``peak``; the last
    ``tail`` steps have the value ``end``, and steps past the run keep the last value.
    """
    if step < schedule.warmup:
        return schedule.start + (schedule.peak - schedule.start) * step / schedule.warmup
    if schedule.end is None:
        return schedule.peak
    # the last step before the tail is the one that reaches `end`
    span = num_steps - schedule.tail - schedule.warmup - 1
    progress = min(1.0, (step - schedule.warmup) / span) if span > 0 else 1.0
    share = progress if schedule.kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
    return schedule.peak + (schedule.end - schedule.peak) * share
