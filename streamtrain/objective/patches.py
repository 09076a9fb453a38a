"""Masked-patch losses on backbone features, without a head (Siméoni et al. 2025; iBOT is in prototypes)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def l2_loss(student: Tensor, teacher: Tensor, row_weight: Tensor) -> Tensor:
    """``Σ_i w_i ‖s_i − t_i‖²`` for ``student, teacher [M, dim]`` and ``row_weight [M]``: fp32 scalar."""
    distance = (_wide(student) - _wide(teacher)).square().sum(1)
    return (row_weight * distance).sum()


def cosine_loss(student: Tensor, teacher: Tensor, row_weight: Tensor) -> Tensor:
    """``Σ_i w_i (1 − cos(s_i, t_i))`` for ``student, teacher [M, dim]`` and ``row_weight [M]``: fp32 scalar."""
    cosine = F.cosine_similarity(_wide(student), _wide(teacher), dim=1, eps=1e-6)
    return (row_weight * (1.0 - cosine)).sum()


def _wide(features: Tensor) -> Tensor:
    return features.float() if features.element_size() < 4 else features
