"""Kozachenko-Leonenko entropy: features spread out over the sphere (Sablayrolles et al. 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# smooths the logarithm at distance 0, where the gradient then is 0
EPSILON = 1e-8


def koleo_loss(features: Tensor) -> Tensor:
    """``−mean_i log min_{j≠i} ‖x_i − x_j‖`` over unit vectors x of ``features [B, dim]``: fp32 scalar.

    In fp32 whatever the features are. Without a neighbour (B < 2) it is 0; for duplicates it is large but
    finite, with gradient 0, since no direction parts them.
    """
    features = features.float() if features.element_size() < 4 else features
    if features.shape[0] < 2:
        return (features * 0.0).sum()
    unit = F.normalize(features, dim=-1, eps=EPSILON)
    with torch.no_grad():
        similarity = unit @ unit.T
        neighbour = similarity.fill_diagonal_(-2.0).argmax(dim=1)
    squared = (unit - unit.index_select(0, neighbour)).square().sum(1)
    return -0.5 * (squared + EPSILON**2).log().mean()
