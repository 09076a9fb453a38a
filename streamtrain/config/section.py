"""The base of every configuration section: frozen, and no unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen group of keys; a key that is not listed is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0)]
Range = tuple[float, float]


def check_range(name: str, bounds: Range, low: float, high: float) -> Range:
    """Return ``bounds`` if ``low <= bounds[0] <= bounds[1] <= high``, else raise ``ValueError``."""
    if not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"{name} must be two ascending numbers within [{low}, {high}], not {list(bounds)}")
    return bounds
