"""Do patches find themselves again in another view of their image? An evaluation of dense features without labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ZOOM = 1.25


def second_view(images: Tensor) -> Tensor:
    """uint8 [N, S, S, 3]: the middle of each image, enlarged by ``ZOOM`` and mirrored."""
    side = images.shape[1]
    inner = round(side / ZOOM)
    start = (side - inner) // 2
    middle = images[:, start : start + inner, start : start + inner].permute(0, 3, 1, 2).float()
    enlarged = F.interpolate(middle, size=(side, side), mode="bicubic", align_corners=False).round_().clamp_(0, 255)
    return enlarged.flip(-1).permute(0, 2, 3, 1).to(torch.uint8)


def matched(first: Tensor, second: Tensor) -> Tensor:
    """Which patches of ``second_view`` have their nearest neighbour where they came from, or right beside it.

    Args:
        first, second: patch features [N, side * side, dim] of the images and of their second views.

    Returns:
        bool [N, side * side]; by chance a share of about 9 / side² is true.
    """
    side = round(first.shape[1] ** 0.5)
    similarities = F.normalize(second.float(), dim=-1) @ F.normalize(first.float(), dim=-1).transpose(1, 2)
    found = similarities.argmax(-1)
    centres = (torch.arange(side, device=first.device) + 0.5) / side - 0.5
    # in units of patches, of the first view
    rows = (centres / ZOOM + 0.5) * side - 0.5
    columns = (-centres / ZOOM + 0.5) * side - 0.5
    off = torch.maximum(
        (found // side - rows.repeat_interleave(side)).abs(), (found % side - columns.repeat(side)).abs()
    )
    return off <= 1.0
