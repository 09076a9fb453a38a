"""Block masks of the student's global crops."""

from __future__ import annotations

import math

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


def group_counts(masks: MasksConfig, num_views: int, num_patches: int) -> list[int]:
    """Masked patches of the masked crops of one group, ascending: one a stratum of ``masks.ratio``."""
    masked = round(masks.probability * masks.group * num_views)
    low, high = masks.ratio
    return [round((low + (high - low) * (k + 0.5) / masked) * num_patches) for k in range(masked)]


def max_rows(masks: MasksConfig, batch_size: int, num_views: int, num_patches: int, alignment: int) -> int:
    """The most masked patches that ``batch_size`` consecutive slots can have, at least 1.

    ``alignment``: the first slot is a multiple of it. A batch of whole groups has exactly this many.
    """
    counts = group_counts(masks, num_views, num_patches)
    alignment = math.gcd(alignment, masks.group)
    most = 1
    for start in range(0, masks.group, alignment):
        rows, slot, left = 0, start, batch_size
        while left:
            taken = min(left, masks.group - slot)
            # the worst deal: the heaviest ratios of the group all fall into this part of it
            rows += sum(counts[-taken * num_views :])
            left, slot = left - taken, 0
        most = max(most, rows)
    return most
