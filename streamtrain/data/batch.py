"""What the loader hands to the learner: tensors on the compute device and the slots they came from."""

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
        index: int64 [M], flat positions ``crop * T + patch`` of the masked patches in ascending order, then
            0 up to M, which is the same in every micro-batch.
        weight: float32 [M], 1 / (masked patches of that crop); 0 in the padding.
    """

    grid_mask: Tensor
    index: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples on the compute device.

    Attributes:
        slots: int64 [B], the place of each sample in the stream.
        global_crops: uint8 [V*B, H, W, 3], view-major.
        local_crops: uint8 [L*B, h, w, 3], view-major; L may be 0.
        masks: of the global crops.
        gram_crops: uint8 [V*B, S, S, 3], the global crops' boxes without their colours, for a Gram teacher that
            has its own size; else None.
    """

    slots: np.ndarray
    global_crops: Tensor
    local_crops: Tensor
    masks: Masks
    gram_crops: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All of them."""
        masks = self.masks
        crops = [self.global_crops, self.local_crops, *([] if self.gram_crops is None else [self.gram_crops])]
        return [*crops, masks.grid_mask, masks.index, masks.weight]


def normalise(crops: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """uint8 [N, H, W, 3] to [N, 3, H, W] of ``dtype``: ``(x / 255 - mean) / std``, on the crops' device.

    The arithmetic is fp32 whatever ``dtype`` is; rounding happens once, at the end.
    """
    num, height, width, _ = crops.shape
    planes = torch.empty(num, 3, height, width, dtype=dtype, device=crops.device)
    for channel in range(3):
        # plain numbers, not small tensors: a tensor made on a GPU would wait for it
        plane = crops[..., channel].float()
        planes[:, channel] = plane.mul_(1 / (255 * std[channel])).add_(-mean[channel] / std[channel])
    return planes
