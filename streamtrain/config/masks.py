"""The ``masks`` section: block masks of the student's global crops."""

from __future__ import annotations

import math
from typing import Annotated

from streamtrain.config.section import Positive, Probability, Range, Section, accept, within


class MasksConfig(Section):
    """Masks of the student's global crops. Masked patches are rectangles, filled up to an exact count."""

    probability: Probability = accept(0.5, "Share of the global crops of a group that are masked.")
    ratio: Annotated[Range, within("ratio", 0.0, 1.0)] = accept(
        (0.1, 0.5), "Range of the share of a masked crop's patches; spread evenly over a group."
    )
    aspect: Annotated[Range, within("aspect", 0.05, 20.0)] = accept(
        (0.3, 1 / 0.3), "Range of a rectangle's height / width."
    )
    group: Positive = accept(16, "Number of consecutive images over which crops and ratios are distributed evenly.")


def group_counts(masks: MasksConfig, num_views: int, num_patches: int) -> list[int]:
    """Return the number of masked patches of each masked crop of one group, ascending."""
    masked = round(masks.probability * masks.group * num_views)
    low, high = masks.ratio
    return [round((low + (high - low) * (k + 0.5) / masked) * num_patches) for k in range(masked)]


def max_rows(masks: MasksConfig, batch_size: int, num_views: int, num_patches: int, alignment: int) -> int:
    """Return the maximum number of masked patches of ``batch_size`` consecutive slots, at least 1.

    The first slot is a multiple of ``alignment``. A batch of whole groups has exactly this many masked patches.
    """
    counts = group_counts(masks, num_views, num_patches)
    alignment = math.gcd(alignment, masks.group)
    most = 1
    for start in range(0, masks.group, alignment):
        rows, slot, left = 0, start, batch_size
        while left:
            taken = min(left, masks.group - slot)
            # worst case: the highest ratios of the group all fall into this part of it
            rows += sum(counts[-taken * num_views :])
            left, slot = left - taken, 0
        most = max(most, rows)
    return most
