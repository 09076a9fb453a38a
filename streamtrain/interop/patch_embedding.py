"""Adapt the patch embedding of RGB weights to images of other channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamtrain.config.init import ChannelRule

PROJECTION = "embedding.projection.weight"


@dataclass(frozen=True)
class RgbAdaptation:
    """The rule for RGB weights in a network whose images have other channels (``init.channels``).

    Attributes:
        is_needed: raise for weights that are not for RGB, because the rule would have no effect.
    """

    rule: ChannelRule
    channels: int
    is_needed: bool = False

    def is_rgb(self, stored: torch.Size, expected: torch.Size) -> bool:
        """Return whether a stored patch embedding, [dim, 3, p, p] or [dim, 3 * p²], only differs in the channels.

        ``expected`` is [dim, channels * p²].
        """
        if self.channels == 3 or len(expected) != 2 or len(stored) not in (2, 4):
            return False
        is_rgb = len(stored) == 2 or (stored[1] == 3 and stored[2] == stored[3])
        area = expected[1] // self.channels
        return is_rgb and stored[0] == expected[0] and stored[1:].numel() == 3 * area

    def adapt(self, weight: Tensor) -> Tensor:
        """Return the fp32 patch embedding [dim, channels * p²] made of one for RGB, [dim, 3 * p²].

        With ``repeat`` and ``mean``, the kernels sum to the same as those for RGB, and equal channels therefore give
        the same tokens as in RGB.
        """
        kernels = weight.float().unflatten(1, (3, -1))
        if self.rule == "mean":
            kernels = kernels.sum(1, keepdim=True).expand(-1, self.channels, -1) / self.channels
        elif self.rule == "repeat":
            source = torch.arange(self.channels) % 3
            kernels = kernels[:, source] / source.bincount()[source][:, None]
        else:
            assert self.rule == "zero_extra"
            kernels = torch.cat([kernels, kernels.new_zeros(len(kernels), self.channels - 3, kernels.shape[2])], 1)
        return kernels.flatten(1)
