"""A micro-batch: crops, masks and slots of B samples on the compute device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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

    Attributes:
        slots: int64 [B], stream position of each sample.
        global_crops: uint8 [V*B, H, W, 3], view-major.
        local_crops: uint8 [L*B, h, w, 3], view-major; L may be 0.
        masks: masks of the global crops.
        gram_crops: uint8 [V*B, S, S, 3], the boxes of the global crops without colour changes, for a Gram teacher
            with its own input size; None without one.
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


def normalise(crops: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Convert uint8 [N, H, W, 3] to [N, 3, H, W] of ``dtype``: ``(x / 255 - mean) / std``, on the crops' device.

    Computed in fp32 and rounded to ``dtype`` once, at the end.
    """
    num, height, width, _ = crops.shape
    planes = torch.empty(num, 3, height, width, dtype=dtype, device=crops.device)
    for channel in range(3):
        # Python floats: creating small tensors on a GPU would sync
        plane = crops[..., channel].float()
        planes[:, channel] = plane.mul_(1 / (255 * std[channel])).add_(-mean[channel] / std[channel])
    return planes
