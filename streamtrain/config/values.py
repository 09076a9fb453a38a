"""Pure functions from the step to a value."""

from __future__ import annotations

import math

from streamtrain.config.schedules import Schedule


def value_at(schedule: Schedule, step: int, num_steps: int) -> float:
    """Value of ``schedule`` at ``step`` (from 0) of a run of ``num_steps`` steps.

    The warm-up's first step (after the delay) has the value ``start`` and the step after it ``peak``; the last
    ``tail`` steps have the value ``end``, and steps past the run keep the last value.
    """
    begun, start = schedule.delay + schedule.warmup, schedule.start or 0.0
    if step < begun:
        waited = max(0, step - schedule.delay)
        return start + (schedule.peak - start) * waited / schedule.warmup if waited else start
    if schedule.end is None:
        return schedule.peak
    # the last step before the tail is the one that reaches `end`
    span = num_steps - schedule.tail - begun - 1
    progress = min(1.0, (step - begun) / span) if span > 0 else 1.0
    share = progress if schedule.kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * progress)
    return schedule.peak + (schedule.end - schedule.peak) * share
