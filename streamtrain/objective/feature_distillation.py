"""Distances between features of the student and of a frozen network, without prototypes."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from streamtrain.objective.feature_losses import at_least_fp32

DistanceKind = Literal["cosine", "smooth_l1"]


def token_distance(kind: DistanceKind, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the distance of each token ``[..., dim]`` to the teacher's, which broadcasts: fp32 ``[...]``.

    ``cosine`` is 1 - cosine similarity. ``smooth_l1`` is the smooth L1 distance, averaged over the width, to the
    teacher's token after its standardisation to mean 0 and variance 1; the scale of that token has no effect.
    """
    student, teacher = at_least_fp32(student), at_least_fp32(teacher)
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(student, teacher, dim=-1, eps=1e-6)
    target = F.layer_norm(teacher, teacher.shape[-1:], eps=1e-6)
    difference = (student - target).abs()
    return (0.5 * difference.square()).where(difference < 1.0, difference - 0.5).mean(-1)


def same_view_loss(kind: DistanceKind, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean distance between tokens of the same crops, both ``[..., dim]``: fp32 scalar."""
    return token_distance(kind, student, teacher).mean()


def local_view_loss(kind: DistanceKind, student: Tensor, teacher: Tensor, images: int) -> Tensor:
    """Return the mean distance between local crops and all global crops of the same image: fp32 scalar.

    Args:
        student: CLS tokens of the local crops ``[L * images, dim]``, view-major.
        teacher: CLS tokens of the global crops ``[V * images, dim]``, view-major.
        images: number of images.
    """
    local, full = student.unflatten(0, (-1, images)), teacher.unflatten(0, (-1, images))
    return token_distance(kind, local[:, None], full[None]).mean()
