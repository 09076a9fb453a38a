"""Losses between projected student features and the features of a frozen teacher, without prototypes."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from streamtrain.objective.feature_losses import at_least_fp32

DistanceKind = Literal["cosine", "smooth_l1"]


def token_distance(kind: DistanceKind, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the distance of each token ``[..., dim]`` to the teacher's, which broadcasts: fp32 ``[...]``.

    ``cosine`` is 1 - cos. ``smooth_l1`` is the mean over the width of the smooth L1 distance to the teacher's token
    standardised to mean 0 and variance 1, so that it does not depend on the scale of the teacher's features.
    """
    student, teacher = at_least_fp32(student), at_least_fp32(teacher)
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(student, teacher, dim=-1, eps=1e-6)
    target = F.layer_norm(teacher, teacher.shape[-1:], eps=1e-6)
    difference = (student - target).abs()
    return (0.5 * difference.square()).where(difference < 1.0, difference - 0.5).mean(-1)


def same_view_loss(kind: DistanceKind, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean distance of tokens of the same crops, ``[rows, dim]`` both: fp32 scalar."""
    return token_distance(kind, student, teacher).mean()


def local_view_loss(kind: DistanceKind, student: Tensor, teacher: Tensor, images: int) -> Tensor:
    """Return the mean distance of local crops' CLS ``[L * images, dim]`` to those ``[V * images, dim]`` of all views.

    Both are view-major.
    """
    local, full = student.unflatten(0, (-1, images)), teacher.unflatten(0, (-1, images))
    return token_distance(kind, local[:, None], full[None]).mean()
