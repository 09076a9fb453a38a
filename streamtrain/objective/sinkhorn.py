"""Teacher assignments to prototypes: Sinkhorn-Knopp, or a centred softmax (Caron et al. 2020, 2021).

An assignment ``P [N, K]`` is never held; it is kept as log scalings of its columns and rows, from which any
chunk of it follows: ``P = exp(logits / temperature + column + row[:, None])``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from streamtrain.objective.distributed import max_over_ranks, sum_over_ranks, world_size
from streamtrain.objective.logits import Buffer, accumulator, chunks, fused, row_log_sum_exp, scaled_logits

# below any sum that can occur; only keeps the logarithm finite where there is no row at all
TINY = 1e-30


@dataclass(frozen=True)
class Assignment:
    """Log scalings of an assignment; each valid row of ``P`` sums to 1, any other is all 0."""

    # [num_prototypes], the same on all ranks
    column: Tensor
    # [num_rows], of this rank's rows; −inf for a row that is not valid
    row: Tensor

    def rows(self, part: slice) -> Assignment:
        """The assignment of some of the rows."""
        return Assignment(self.column, self.row[part])


@torch.no_grad()
def sinkhorn(
    features: Tensor,
    weight: Tensor,
    temperature: float,
    iterations: int,
    chunk: int,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
) -> Assignment:
    """Sinkhorn-Knopp over the rows of all ranks of ``group``, in the log domain: safe at any logit scale.

    Each iteration gives every prototype the same total, then every row the total 1; it is one sweep over
    chunks of ``chunk`` prototypes, since a chunk's column sums are final once it has been seen.

    Args:
        features: teacher bottlenecks ``[N, d]`` of this rank; N may be 0.
        weight: prototypes ``[K, d]``.
        temperature: the teacher's.
        iterations: at least 1.
        chunk: prototypes a chunk.
        group: ranks that share the assignment; None: all.
        valid: bool ``[N]``; rows that are False (padding) take no part. None: all do.
    """
    num_prototypes = weight.shape[0]
    assert num_prototypes > 0, "the prototypes are not gathered here"
    dtype = accumulator(features.dtype)
    start = torch.zeros(features.shape[0], dtype=dtype, device=features.device)
    if valid is not None:
        start = start.masked_fill(~valid, -torch.inf)
    total = sum_over_ranks(torch.isfinite(start).sum().to(dtype), group).clamp_min(1.0)
    if fused((features, weight)):
        return _by_kernels(features.contiguous(), weight.contiguous(), temperature, iterations, group, start, total)
    column = torch.empty(num_prototypes, dtype=dtype, device=features.device)
    row = start
    buffer = Buffer(features.shape[0], chunk, features)
    for iteration in range(iterations):
        # logarithm of the row's sum over the chunks so far
        change = torch.full_like(start, -torch.inf)
        for part in chunks(num_prototypes, chunk):
            scale = column[part] if iteration else None
            entries = scaled_logits(features, weight[part], temperature, scale, buffer.of(part))
            if iteration or valid is not None:
                entries.add_(row[:, None])
            if iteration:
                # Scaled by the iteration before, entries are at most 1 / N and no sum leaves [1 / (K N), K]: plain
                # exponentials can neither overflow nor vanish.
                factor = _column_factor(entries.exp_().sum(0), num_prototypes, group)
                column[part] += factor.log()
                row_sum = (entries @ factor).log()
            else:
                # Of unscaled entries either sum could leave what fp32 holds. So they are taken down by their columns'
                # maxima, then by what is left of their rows': each row has an entry of 1, and each column still has
                # one in a row that the second step left as it was. The others count with what it took from them, and
                # such a weight vanishes only where the entries would have. (Rows first would leave columns without.)
                shift = _column_maximum(entries, group)
                highest = entries.sub_(shift).amax(1).nan_to_num(neginf=0.0)
                entries.sub_(highest[:, None]).exp_()
                factor = _column_factor(highest.exp() @ entries, num_prototypes, group)
                column[part] = factor.log() - shift
                row_sum = highest + (entries @ factor).log()
            change = torch.logaddexp(change, row_sum)
        # a row that is not valid has no sum, and its scaling must stay −inf
        row = torch.where(torch.isfinite(start), row - change - total.log(), start)
    return Assignment(column, row + total.log())


def _by_kernels(
    features: Tensor, weight: Tensor, temperature: float, iterations: int, group: dist.ProcessGroup | None,
    start: Tensor, total: Tensor,
) -> Assignment:
    """The same by the kernels for CPUs; over several ranks the rows' sums take a sweep of their own."""  # fmt: skip
    alone = world_size(group) == 1
    row = start
    for _ in range(iterations):
        column, row_sum = torch.ops.streamtrain.sinkhorn(features, weight, temperature, row, alone)
        if not alone:
            shift = max_over_ranks(column.clone(), group).nan_to_num(neginf=0.0)
            factor = _column_factor(row_sum * (column - shift).exp(), weight.shape[0], group)
            column = factor.log() - shift
            row_sum = torch.ops.streamtrain.row_log_sum_exp(features, weight, temperature, column)
        # a row that is not valid keeps its scaling of −inf
        row = torch.where(torch.isfinite(start), -row_sum - total.log(), start)
    return Assignment(column, row + total.log())


def _column_factor(sums: Tensor, num_prototypes: int, group: dist.ProcessGroup | None) -> Tensor:
    """``[chunk]``: what gives each prototype ``1 / num_prototypes`` of the whole, from this rank's ``sums [chunk]``."""
    return 1 / (num_prototypes * sum_over_ranks(sums, group).clamp_min(TINY))


def _column_maximum(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``[chunk]`` over the rows of all ranks; finite even without rows."""
    if logits.shape[0]:
        maximum = logits.amax(0)
    else:
        maximum = logits.new_full((logits.shape[1],), -torch.inf)
    return max_over_ranks(maximum, group).nan_to_num(neginf=0.0)


@torch.no_grad()
def centered_softmax(
    features: Tensor,
    weight: Tensor,
    center: Tensor,
    temperature: float,
    chunk: int,
    valid: Tensor | None = None,
) -> Assignment:
    """``softmax((logits − center) / temperature)`` of ``features [N, d]``, ``weight [K, d]``, ``center [K]``."""
    assert weight.shape[0] > 0, "the prototypes are not gathered here"
    column = -center.to(accumulator(features.dtype)) / temperature
    row = -row_log_sum_exp(features, weight, temperature, chunk, column)
    if valid is not None:
        row = row.masked_fill(~valid, -torch.inf)
    return Assignment(column, row)


@torch.no_grad()
def update_center(
    center: Tensor,
    features: Tensor,
    weight: Tensor,
    momentum: float,
    group: dist.ProcessGroup | None = None,
    valid: Tensor | None = None,
) -> None:
    """Move ``center [K]`` in place towards the mean logits of all ranks' rows.

    The mean of the logits is the logits of the mean row, so that no ``[N, K]`` is formed. Without any row the
    centre stays.
    """
    rows = features.to(accumulator(features.dtype))
    kept = torch.ones_like(rows[:, 0]) if valid is None else valid.to(rows.dtype)
    sums = sum_over_ranks(torch.cat([kept @ rows, kept.sum()[None]]), group)
    mean = sums[:-1] / sums[-1].clamp_min(1.0)
    move = (1.0 - momentum) * (sums[-1] > 0)
    center.lerp_((weight.to(mean.dtype) @ mean).to(center.dtype), move.to(center.dtype))
