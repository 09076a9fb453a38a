"""Projection heads, an MLP to a normalised bottleneck, then prototypes; and the projector of feature distillation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamtrain.config.model import HeadConfig
from streamtrain.model.layers import Linear


class Projection(nn.Module):
    """``layers`` linear layers with GELU between them, then L2 normalisation."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        sizes = [dim, *[config.hidden] * (config.layers - 1), config.bottleneck]
        self.layers = nn.ModuleList([Linear(a, b) for a, b in pairwise(sizes)])

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[num_rows, dim]`` to unit vectors ``[num_rows, bottleneck]``."""
        for index, layer in enumerate(self.layers):
            features = layer(F.gelu(features) if index else features)
        # in fp32: an error of a 16-bit norm would scale the whole row; eps bounds the gradient of a zero row
        return F.normalize(features.float(), dim=-1, eps=1e-6).to(features.dtype)


class Projector(nn.Module):
    """Linear layers with GELU between them, from the student's width to a feature teacher's."""

    def __init__(self, dim: int, out: int, layers: int, hidden: int) -> None:
        super().__init__()
        sizes = [dim, *[hidden] * (layers - 1), out]
        self.layers = nn.ModuleList([Linear(a, b) for a, b in pairwise(sizes)])

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[num_rows, dim]`` to ``[num_rows, out]``."""
        for index, layer in enumerate(self.layers):
            features = layer(F.gelu(features) if index else features)
        return features


class Prototypes(nn.Module):
    """The last layer, without a bias."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.prototypes, config.bottleneck))

    def forward(self, features: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return ``loss(features, weight)`` for unit vectors ``[num_rows, bottleneck]``.

        The loss is evaluated in this forward because a sharded engine gathers the weight only for it.
        """
        return loss(features, self.weight)


class ProjectionHead(nn.Module):
    """The projection and the prototypes of one loss."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.projection = Projection(dim, config)
        self.prototypes = Prototypes(config)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[num_rows, dim]`` to the normalised bottleneck ``[num_rows, bottleneck]``."""
        return self.projection(features)
