"""A buffer of a rank, and the phases of a step in which it exists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Location = Literal["gpu", "host", "disk"]

ALWAYS = "always"
TEACHER, TARGETS, LOSS = "teacher pass", "targets", "prototype loss"
# of the time only: the memory of the student's forward peaks in the prototype loss
FORWARD = "student forward"
BACKWARD, OPTIMISER, AVERAGE = "backward", "optimiser step", "average update"
# after the last step; other checkpoints are written during the next steps
EVALUATION, CHECKPOINT = "evaluation", "last checkpoint"
STEP_PHASES = (TEACHER, TARGETS, LOSS, BACKWARD, OPTIMISER, AVERAGE)
PHASES = (*STEP_PHASES, EVALUATION, CHECKPOINT)


@dataclass(frozen=True)
class Part:
    """One buffer of a rank."""

    name: str
    location: Location
    num_bytes: int
    # phases in which it exists, or ALWAYS
    when: tuple[str, ...]
    # how num_bytes is computed
    arithmetic: str


def part(name: str, location: Location, when: tuple[str, ...] | str, *factors: tuple[float, str]) -> Part:
    """Return a part of the product of ``factors`` in bytes, each with its unit for the printed arithmetic."""
    when = (when,) if isinstance(when, str) else when
    arithmetic = " x ".join(f"{value:,.15g} {unit}" for value, unit in factors)
    return Part(name, location, round(math.prod(value for value, _ in factors)), when, arithmetic)
