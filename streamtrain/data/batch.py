"""A micro-batch: crops, masks and slots of B samples on the compute device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.format.pixels import VALUE_RANGES, Range

UNIT_RANGE = (VALUE_RANGES["uint8"],)


@dataclass(frozen=True)
class Masks:
    """Masked patches of the global crops; crops are view-major (row ``view * B + sample``), T patches each.

    Attributes:
        grid_mask: bool [V*B, T], true where a patch is masked.
        index: int64 [M], flat positions ``crop * T + patch`` of the masked patches in ascending order, padded with 0
            to a length M that is equal in every micro-batch.
        weight: float32 [M], 1 / (masked patches of that crop); 0 in the padding.
    """

    grid_mask: Tensor
    index: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples on the compute device.

    Crops have stored values: uint8, or float32 for images of another dtype.

    Attributes:
        slots: int64 [B], stream position of each sample.
        global_crops: [V*B, H, W, channels], view-major.
        local_crops: [L*B, h, w, channels], view-major; L may be 0.
        masks: masks of the global crops.
        gram_crops: [V*B, height, width, channels], the boxes of the global crops without colour changes, for a Gram
            teacher with its own input size; None without one.
    """

    slots: np.ndarray
    global_crops: Tensor
    local_crops: Tensor
    masks: Masks
    gram_crops: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        masks = self.masks
        crops = [self.global_crops, self.local_crops, *([] if self.gram_crops is None else [self.gram_crops])]
        return [*crops, masks.grid_mask, masks.index, masks.weight]


def normalise(
    crops: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    value_range: Sequence[Range] = UNIT_RANGE,
) -> Tensor:
    """Convert [N, H, W, channels] to [N, channels, H, W] of ``dtype``, on the crops' device.

    The result is ``((x - low) / (high - low) - mean) / std``, computed in fp32 and rounded to ``dtype`` once. ``mean``,
    ``std`` and ``value_range`` (low, high) are for all channels, or one per channel.
    """
    num, height, width, channels = crops.shape
    planes = torch.empty(num, channels, height, width, dtype=dtype, device=crops.device)
    for channel in range(channels):
        low, high = value_range[channel % len(value_range)]
        shift, scale = mean[channel % len(mean)], std[channel % len(std)]
        # Python floats: creating small tensors on a GPU would sync
        plane = crops[..., channel].to(torch.float32, copy=True)
        planes[:, channel] = plane.mul_(1 / ((high - low) * scale)).add_((-low / (high - low) - shift) / scale)
    return planes
