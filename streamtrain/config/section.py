"""The base of every configuration section: frozen, and no unknown keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo


class Section(BaseModel):
    """A frozen group of keys; a key that is not listed is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0)]
Range = tuple[float, float]

# validation context: a function of no arguments that gives the steps of an epoch
STEPS_PER_EPOCH = "steps_per_epoch"
_EPOCHS = re.compile(r"^\s*(\d+(?:\.\d*)?)\s*epochs?\s*$")


def _in_steps(value: Any, info: ValidationInfo) -> Any:
    """``"10 epochs"`` as a number of steps; anything else as it is."""
    found = _EPOCHS.match(value) if isinstance(value, str) else None
    if found is None:
        return value
    steps_per_epoch: Callable[[], float] | None = (info.context or {}).get(STEPS_PER_EPOCH)
    if steps_per_epoch is None:
        raise ValueError("an epoch has a number of steps only for a set of images; give data.shards")
    return round(float(found[1]) * steps_per_epoch())


# a number of steps, in a file also "N epochs" of data.shards
Steps = Annotated[int, BeforeValidator(_in_steps), Field(ge=0)]
PositiveSteps = Annotated[int, BeforeValidator(_in_steps), Field(ge=1)]


# bytes in units of 1000 and of 1024
_UNITS = {"B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes of ``80GB``, ``139 GiB`` or a bare number.

    Raises:
        ValueError: it is not such a size.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or unit is None:
        raise ValueError("must be a size such as 80GB or 139GiB, or a number of bytes")
    return round(float(match[1]) * unit)


# a number of bytes, in a file also as text with a unit
Size = Annotated[
    int, BeforeValidator(lambda value: parse_bytes(value) if isinstance(value, str) else value), Field(ge=1)
]


def branch(name: str) -> str:
    """The tag of one form of a key that has several; errors leave it out of the key's name."""
    return f"<{name}>"


def check_range(name: str, bounds: Range, low: float, high: float) -> Range:
    """Return ``bounds`` if ``low <= bounds[0] <= bounds[1] <= high``, else raise ``ValueError``."""
    if not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"{name} must be two ascending numbers within [{low}, {high}], not {list(bounds)}")
    return bounds
