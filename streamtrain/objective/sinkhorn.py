"""Teacher assignments to prototypes: Sinkhorn-Knopp, or a centred softmax (Caron et al. 2020, 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamtrain.ops.collectives import sum_over_ranks
from streamtrain.ops.logits import accumulator, row_log_sum_exp
from streamtrain.ops.prototypes import sinkhorn_scalings


@dataclass(frozen=True)
class Assignment:
    """Log scalings of an assignment ``P = exp(logits / temperature + column + row[:, None])``.

    P is never held whole. Each valid row of ``P [N, K]`` sums to 1; the others are 0.
    """

    # [num_prototypes], the same on all ranks
    column: Tensor
    # [num_rows], for this rank's rows; −inf for an invalid row
    row: Tensor

    def rows(self, part: slice) -> Assignment:
        return Assignment(self.column, self.row[part])


@torch.no_grad()
def sinkhorn(
    features: Tensor, weight: Tensor, temperature: float, iterations: int, chunk: int, valid: Tensor | None = None
) -> Assignment:
    """Compute Sinkhorn-Knopp over the rows of all ranks, in the log domain: safe at any logit scale.

    Each iteration gives every prototype the same total, then every row the total 1. It is one sweep over chunks of
    prototypes, since the column sums of a chunk are final after it.

    Args:
        features: teacher bottlenecks ``[N, d]`` of this rank; N may be 0.
        weight: prototypes ``[K, d]``.
        chunk: prototypes per chunk.
        valid: bool ``[N]``; rows that are False (padding) are ignored. None: all are valid.
    """
    assert weight.shape[0] > 0, "the prototypes are not gathered here"
    return Assignment(*sinkhorn_scalings(features, weight, temperature, iterations, chunk, valid))


@torch.no_grad()
def centered_softmax(
    features: Tensor, weight: Tensor, center: Tensor, temperature: float, chunk: int, valid: Tensor | None = None
) -> Assignment:
    """Return ``softmax((logits − center) / temperature)`` of ``features [N, d]``, ``weight [K, d]``, ``center [K]``."""
    assert weight.shape[0] > 0, "the prototypes are not gathered here"
    column = -center.to(accumulator(features.dtype)) / temperature
    row = -row_log_sum_exp(features, weight, temperature, chunk, column)
    if valid is not None:
        row = row.masked_fill(~valid, -torch.inf)
    return Assignment(column, row)


@torch.no_grad()
def update_center(
    center: Tensor, features: Tensor, weight: Tensor, momentum: float, valid: Tensor | None = None
) -> None:
    """Move ``center [K]`` in place towards the mean logits of all ranks' rows; without any row it does not change.

    The mean of the logits equals the logits of the mean row, so no ``[N, K]`` is formed.
    """
    rows = features.to(accumulator(features.dtype))
    kept = torch.ones_like(rows[:, 0]) if valid is None else valid.to(rows.dtype)
    sums = sum_over_ranks(torch.cat([kept @ rows, kept.sum()[None]]))
    mean = sums[:-1] / sums[-1].clamp_min(1.0)
    move = (1.0 - momentum) * (sums[-1] > 0)
    center.lerp_((weight.to(mean.dtype) @ mean).to(center.dtype), move.to(center.dtype))
