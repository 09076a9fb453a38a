"""Block masks of the student's global crops."""

from __future__ import annotations

from pydantic import field_validator

from streamtrain.config.section import Positive, Probability, Range, Section, check_range


class MasksConfig(Section):
    """``masks``: all of it affects results. ``ratio`` is the share of a crop's patches."""

    # share of the global crops of a group that are masked
    probability: Probability = 0.5
    ratio: Range = (0.1, 0.5)
    # height / width of the rectangles
    aspect: Range = (0.3, 1 / 0.3)
    # masks are stratified within so many consecutive slots
    group: Positive = 16

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, value: Range) -> Range:
        return check_range("ratio", value, 0.0, 1.0)

    @field_validator("aspect")
    @classmethod
    def _aspect(cls, value: Range) -> Range:
        return check_range("aspect", value, 0.05, 20.0)
