"""Patch retrieval: evaluate dense features without labels by matching patches between two views of an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ZOOM = 1.25


def second_view(images: Tensor) -> Tensor:
    """Return the centre of each image [N, S, S, channels], enlarged by ``ZOOM`` and mirrored."""
    side = images.shape[1]
    inner = round(side / ZOOM)
    start = (side - inner) // 2
    middle = images[:, start : start + inner, start : start + inner].permute(0, 3, 1, 2).float()
    enlarged = F.interpolate(middle, size=(side, side), mode="bicubic", align_corners=False)
    if images.dtype == torch.uint8:
        enlarged = enlarged.round_().clamp_(0, 255)
    return enlarged.flip(-1).permute(0, 2, 3, 1).to(images.dtype)


def match_patches(first: Tensor, second: Tensor) -> Tensor:
    """Mark the patches of the second view whose nearest neighbour is their origin in the image or adjacent to it.

    Args:
        first, second: patch features [N, side * side, dim] of images and of their ``second_view``.

    Returns:
        bool [N, side * side]; with random features a share of about 9 / side² is True.
    """
    side = round(first.shape[1] ** 0.5)
    similarities = F.normalize(second.float(), dim=-1) @ F.normalize(first.float(), dim=-1).transpose(1, 2)
    nearest = similarities.argmax(-1)
    centres = (torch.arange(side, device=first.device) + 0.5) / side - 0.5
    # in patches of the first view
    rows = (centres / ZOOM + 0.5) * side - 0.5
    columns = (-centres / ZOOM + 0.5) * side - 0.5
    off = torch.maximum(
        (nearest // side - rows.repeat_interleave(side)).abs(), (nearest % side - columns.repeat(side)).abs()
    )
    return off <= 1.0
