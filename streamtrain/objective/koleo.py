"""Kozachenko-Leonenko entropy: features spread out over the sphere (Sablayrolles et al. 2019)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from streamtrain.objective.distributed import gather_rows, world_size

# smooths the logarithm at distance 0, where the gradient then is 0
EPSILON = 1e-8


def koleo_loss(features: Tensor, neighbours: int = 1) -> Tensor:
    """``−mean_i log ‖x_i − x_j‖`` over unit vectors x of ``features [B, dim]``: fp32 scalar.

    j runs over the nearest ``neighbours`` of i, or all others where there are fewer. In fp32 whatever the
    features are. Without a neighbour (B < 2) it is 0; for duplicates it is large but finite, with gradient 0,
    since no direction parts them.
    """
    unit = _unit(features)
    return _spread(unit, unit, 0, neighbours)


def distributed_koleo_loss(
    features: Tensor, neighbours: int = 1, group_size: int = 0, group: dist.ProcessGroup | None = None
) -> Tensor:
    """KoLeo whose neighbours come from groups of ``group_size`` consecutive samples over the ranks of ``group``.

    The gradient, averaged over ranks as data-parallel training does, is that of the mean over all samples.

    Args:
        features: ``[B, dim]``, the same B on every rank.
        neighbours: nearest neighbours a sample is driven from.
        group_size: samples of a group; 0: all ``B * ranks``. It divides B, or is a multiple of it.
        group: the ranks; None: all.

    Raises:
        ValueError: if the samples do not divide into such groups.
    """
    batch, ranks = features.shape[0], world_size(group)
    size = group_size or batch * ranks
    if (batch * ranks) % size or (batch % size and size % batch):
        raise ValueError(
            f"{batch} samples on each of {ranks} ranks do not form KoLeo groups of {size}; choose a size that "
            f"divides {batch} or is a multiple of {batch} and divides {batch * ranks}"
        )
    unit = _unit(features)
    if size <= batch:
        return torch.stack([_spread(part, part, 0, neighbours) for part in unit.split(size)]).mean()
    start = dist.get_rank(group) * batch
    first = start // size * size
    candidates = gather_rows(unit, group)[first : first + size]
    return _spread(unit, candidates, start - first, neighbours)


def _unit(features: Tensor) -> Tensor:
    features = features.float() if features.element_size() < 4 else features
    return F.normalize(features, dim=-1, eps=EPSILON)


def _spread(unit: Tensor, candidates: Tensor, offset: int, neighbours: int) -> Tensor:
    """The loss of ``unit [B, dim]``, which stands at ``offset`` among ``candidates [M, dim]``."""
    neighbours = min(neighbours, candidates.shape[0] - 1)
    if neighbours < 1 or not unit.shape[0]:
        return (unit * 0.0).sum()
    with torch.no_grad():
        similarity = unit @ candidates.T
        # nobody is a neighbour of itself
        similarity.diagonal(offset).fill_(-2.0)
        nearest = similarity.topk(neighbours, dim=1).indices
    squared = (unit[:, None] - candidates[nearest]).square().sum(2)
    return -0.5 * (squared + EPSILON**2).log().mean()
