"""Backbones whose features span few dimensions, for ``model.factory``: a collapse of the rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamtrain.model.layers import LayerNorm
from streamtrain.model.vit import VisionTransformer


class _LowRankNorm(LayerNorm):
    """A layer norm, followed by the projection to a random subspace."""

    num_dimensions = 1

    def forward(self, tokens: Tensor) -> Tensor:
        dim = tokens.shape[-1]
        random = torch.randn(dim, self.num_dimensions, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(random).Q.to(tokens)
        return super().forward(tokens) @ basis @ basis.T


def _build(num_dimensions: int, *arguments: Any) -> VisionTransformer:
    model = VisionTransformer(*arguments)
    norm = model.norm
    model.norm = _LowRankNorm(norm.normalized_shape, eps=norm.eps)
    model.norm.num_dimensions = num_dimensions
    return model


def two(*arguments: Any) -> VisionTransformer:
    """Return a backbone with features in two dimensions; arguments as in ``VisionTransformer``."""
    return _build(2, *arguments)


def four(*arguments: Any) -> VisionTransformer:
    """Return a backbone with features in four dimensions; arguments as in ``VisionTransformer``."""
    return _build(4, *arguments)
