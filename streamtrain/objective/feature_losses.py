"""Losses on backbone features without a head: KoLeo, and the L2 and cosine forms of the masked-patch loss.

KoLeo is the Kozachenko-Leonenko entropy, which spreads features over the sphere (Sablayrolles et al. 2019); for the
other two see Siméoni et al. 2025. The iBOT form of the masked-patch loss is in ``prototypes``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from streamtrain.ops.collectives import consecutive_ranks, gather_rows, world_size

# keeps the logarithm finite at distance 0, where the gradient becomes 0
EPSILON = 1e-8


def l2_loss(student: Tensor, teacher: Tensor, row_weight: Tensor) -> Tensor:
    """Return ``Σ_i w_i ‖s_i − t_i‖²`` for ``student, teacher [M, dim]`` and ``row_weight [M]``: fp32 scalar."""
    distance = (at_least_fp32(student) - at_least_fp32(teacher)).square().sum(1)
    return (row_weight * distance).sum()


def cosine_loss(student: Tensor, teacher: Tensor, row_weight: Tensor) -> Tensor:
    """Return ``Σ_i w_i (1 − cos(s_i, t_i))`` for ``student, teacher [M, dim]`` and ``row_weight [M]``: fp32 scalar."""
    cosine = F.cosine_similarity(at_least_fp32(student), at_least_fp32(teacher), dim=1, eps=1e-6)
    return (row_weight * (1.0 - cosine)).sum()


def koleo_loss(features: Tensor, neighbours: int = 1) -> Tensor:
    """Return ``−mean_i log ‖x_i − x_j‖`` over unit vectors x of ``features [B, dim]``: fp32 scalar.

    j runs over the nearest ``neighbours`` of i, or all others if there are fewer. 16-bit features are widened to fp32.
    For B < 2 the loss is 0; for duplicates it is large but finite, with gradient 0, since no direction separates them.
    """
    unit = _unit(features)
    return _spread(unit, unit, 0, neighbours)


def distributed_koleo_loss(
    features: Tensor, neighbours: int = 1, group_size: int = 0, timeout_seconds: float = 1800.0
) -> Tensor:
    """Return KoLeo with neighbours from groups of ``group_size`` consecutive samples over all ranks.

    The gradient, averaged over ranks as in data-parallel training, is the gradient of the mean over all samples.

    Args:
        features: ``[B, dim]``, the same B on every rank.
        group_size: samples per group; 0: ``B * ranks``. It divides B, or is a multiple of it. Only the ranks of a group
            exchange features.
        timeout_seconds: how long a rank waits for the others of its group.

    Raises:
        ValueError: if the samples cannot be divided into such groups.
    """
    batch, ranks = features.shape[0], world_size()
    size = group_size or batch * ranks
    if (batch * ranks) % size or (batch % size and size % batch):
        raise ValueError(
            f"{batch} samples on each of {ranks} ranks do not form KoLeo groups of {size}; choose a size that "
            f"divides {batch} or is a multiple of {batch} and divides {batch * ranks}"
        )
    unit = _unit(features)
    if size <= batch:
        return torch.stack([_spread(part, part, 0, neighbours) for part in unit.split(size)]).mean()
    start = dist.get_rank() * batch
    first = start // size * size
    candidates = gather_rows(unit, consecutive_ranks(size // batch, timeout_seconds))
    return _spread(unit, candidates, start - first, neighbours)


def at_least_fp32(features: Tensor) -> Tensor:
    """Widen 16-bit features to fp32."""
    return features.float() if features.element_size() < 4 else features


def _unit(features: Tensor) -> Tensor:
    return F.normalize(at_least_fp32(features), dim=-1, eps=EPSILON)


def _spread(unit: Tensor, candidates: Tensor, offset: int, neighbours: int) -> Tensor:
    """Return the loss of ``unit [B, dim]``, which is at ``offset`` in ``candidates [M, dim]``."""
    neighbours = min(neighbours, candidates.shape[0] - 1)
    if neighbours < 1 or not unit.shape[0]:
        return (unit * 0.0).sum()
    with torch.no_grad():
        similarity = unit @ candidates.T
        # a sample is not its own neighbour
        similarity.diagonal(offset).fill_(-2.0)
        nearest = similarity.topk(neighbours, dim=1).indices
    squared = (unit[:, None] - candidates[nearest]).square().sum(2)
    return -0.5 * (squared + EPSILON**2).log().mean()
