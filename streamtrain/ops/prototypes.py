"""Sinkhorn's iterations and the cross-entropy as sweeps over chunks of prototypes, in PyTorch and as CPU kernels.

An assignment ``P [N, K]`` is represented by log scalings of its columns and rows:
``P = exp(logits / temperature + column + row[:, None])``. Neither P nor the logits are held whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from streamtrain.ops.chunks import chunks
from streamtrain.ops.collectives import max_over_ranks, sum_over_ranks, world_size
from streamtrain.ops.logits import Buffer, accumulator, matmul, scaled_logits, uses_kernels

# Smaller than any possible sum; keeps the logarithm finite if there are no rows.
TINY = 1e-30


def sinkhorn_scalings(
    features: Tensor, weight: Tensor, temperature: float, iterations: int, chunk: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the column and row log scalings of ``objective.sinkhorn.sinkhorn``, which explains the arguments."""
    dtype = accumulator(features.dtype)
    start = torch.zeros(features.shape[0], dtype=dtype, device=features.device)
    if valid is not None:
        start = start.masked_fill(~valid, -torch.inf)
    total = sum_over_ranks(torch.isfinite(start).sum().to(dtype)).clamp_min(1.0)
    if uses_kernels((features, weight)):
        features, weight = features.contiguous(), weight.contiguous()
        return _sinkhorn_by_kernels(features, weight, temperature, iterations, start, total)
    num_prototypes = weight.shape[0]
    column = torch.empty(num_prototypes, dtype=dtype, device=features.device)
    row = start
    buffer = Buffer(features.shape[0], chunk, features)
    for iteration in range(iterations):
        # logarithm of the row's sum over the chunks so far
        change = torch.full_like(start, -torch.inf)
        for part in chunks(num_prototypes, chunk):
            bias = column[part] if iteration else None
            entries = scaled_logits(features, weight[part], temperature, bias, buffer.view(part))
            if iteration or valid is not None:
                entries.add_(row[:, None])
            if iteration:
                # Scaled by the previous iteration, entries are at most 1 / N and all sums are within [1 / (K N), K]:
                # plain exponentials can neither overflow nor underflow to 0.
                factor = _column_factor(entries.exp_().sum(0), num_prototypes)
                column[part] += factor.log()
                row_sum = (entries @ factor).log()
            else:
                # Sums of unscaled entries could leave the range of fp32. So subtract the columns' maxima, then the
                # rows' remaining maxima: each row has an entry of 1, and each column still has one in a row that the
                # second step did not change. The other rows count with the factor the second step removed, which
                # underflows only where the entries would have. (Rows first would leave columns without an entry of 1.)
                shift = _column_maximum(entries)
                highest = entries.sub_(shift).amax(1).nan_to_num(neginf=0.0)
                entries.sub_(highest[:, None]).exp_()
                factor = _column_factor(highest.exp() @ entries, num_prototypes)
                column[part] = factor.log() - shift
                row_sum = highest + (entries @ factor).log()
            change = torch.logaddexp(change, row_sum)
        # an invalid row has no sum, and its scaling must stay −inf
        row = torch.where(torch.isfinite(start), row - change - total.log(), start)
    return column, row + total.log()


def _sinkhorn_by_kernels(
    features: Tensor, weight: Tensor, temperature: float, iterations: int, start: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``sinkhorn_scalings`` with the CPU kernels; several ranks need another sweep for the rows' sums."""
    alone = world_size() == 1
    row = start
    for _ in range(iterations):
        column, row_sum = torch.ops.streamtrain.sinkhorn(features, weight, temperature, row, alone)
        if not alone:
            shift = max_over_ranks(column.clone()).nan_to_num(neginf=0.0)
            factor = _column_factor(row_sum * (column - shift).exp(), weight.shape[0])
            column = factor.log() - shift
            row_sum = torch.ops.streamtrain.row_log_sum_exp(features, weight, temperature, column)
        # an invalid row keeps its scaling of −inf
        row = torch.where(torch.isfinite(start), -row_sum - total.log(), start)
    return column, row + total.log()


def _column_factor(sums: Tensor, num_prototypes: int) -> Tensor:
    """Return factors ``[chunk]`` that give each prototype ``1 / num_prototypes``, from this rank's ``sums [chunk]``."""
    return 1 / (num_prototypes * sum_over_ranks(sums).clamp_min(TINY))


def _column_maximum(logits: Tensor) -> Tensor:
    """Return the maxima ``[chunk]`` over the rows of all ranks; finite even without rows."""
    if logits.shape[0]:
        maximum = logits.amax(0)
    else:
        maximum = logits.new_full((logits.shape[1],), -torch.inf)
    return max_over_ranks(maximum).nan_to_num(neginf=0.0)


class CrossEntropyInputs(NamedTuple):
    """The arguments of ``objective.prototypes.prototype_cross_entropy``, which explains them."""

    features: Tensor
    weight: Tensor
    teacher_features: Tensor
    teacher_weight: Tensor
    # log scalings of the assignment's columns [K] and rows [M]
    column: Tensor
    row: Tensor
    pair: Tensor | None
    row_weight: Tensor
    student_temperature: float
    teacher_temperature: float
    chunk: int


def cross_entropy_sums(
    inputs: CrossEntropyInputs, softmax_shift: Tensor, target_factor: Tensor, need_gradient: bool
) -> list[Tensor]:
    """Compute everything of the cross-entropy that needs both students' and teachers' logits.

    Args:
        softmax_shift: ``[N]``; ``exp(logits − shift)`` is the student's softmax times the row's weight.
        target_factor: ``[N]``, factor of the targets summed over the pairs.
        need_gradient: whether the last two results are needed.

    Returns:
        ``Σ_k target_ik · logit_ik [N]``, the targets summed over the pairs; with ``need_gradient`` also
        ``D = exp(logits − shift) − factor · target`` times the prototypes, and ``D.T`` times the features.
    """
    features, weight, teacher_features, teacher_weight, column, row, pair = inputs[:7]
    if not uses_kernels((features, weight), (teacher_features, teacher_weight)):
        return _cross_entropy_by_chunks(inputs, softmax_shift[:, None], target_factor[:, None], need_gradient)
    if pair is None:
        pair = torch.arange(len(features))[:, None]
    return torch.ops.streamtrain.cross_entropy(
        features.contiguous(), weight.contiguous(), inputs.student_temperature, softmax_shift, target_factor,
        teacher_features.contiguous(), teacher_weight.contiguous(), inputs.teacher_temperature, column.float(),
        row.float(), pair.contiguous(), need_gradient,
    )  # fmt: skip


def _cross_entropy_by_chunks(
    inputs: CrossEntropyInputs, softmax_shift: Tensor, target_factor: Tensor, need_gradient: bool
) -> list[Tensor]:
    """Compute ``cross_entropy_sums`` a chunk of prototypes at a time, with shift and factor ``[N, 1]``."""
    features, weight, chunk = inputs.features, inputs.weight, inputs.chunk
    targets = _Targets(inputs)
    matched = torch.zeros_like(softmax_shift[:, 0])
    features_gradient = torch.zeros_like(features, dtype=matched.dtype) if need_gradient else None
    weight_gradient = torch.empty_like(weight) if need_gradient else None
    student_buffer, matched_buffer = (Buffer(features.shape[0], chunk, features) for _ in range(2))
    for part in chunks(weight.shape[0], chunk):
        logits = scaled_logits(features, weight[part], inputs.student_temperature, out=student_buffer.view(part))
        target = targets.chunk(part)
        matched += torch.mul(target, logits, out=matched_buffer.view(part)).sum(1)
        if features_gradient is None or weight_gradient is None:
            continue
        difference = logits.sub_(softmax_shift).exp_()
        difference = difference.addcmul_(target, target_factor, value=-1).to(features.dtype)
        if features.dtype == features_gradient.dtype:
            features_gradient.addmm_(difference, weight[part])
            torch.mm(difference.T, features, out=weight_gradient[part])
        else:
            features_gradient += matmul(difference, weight[part])
            weight_gradient[part] = matmul(difference.T, features).to(weight.dtype)
    if features_gradient is None or weight_gradient is None:
        return [matched]
    return [matched, features_gradient, weight_gradient]


class _Targets:
    """Chunks of the summed target rows ``Σ_j P[pair_ij]``.

    Rows of P are gathered: a dense ``[N, M]`` mixing matrix would cost ``N · M · K``, which for patches, each with its
    own target, is more than the logits themselves.
    """

    def __init__(self, inputs: CrossEntropyInputs) -> None:
        self.weight, self.column = inputs.teacher_weight, inputs.column
        self.temperature = inputs.teacher_temperature
        self.features, self.row = inputs.teacher_features, inputs.row[:, None]
        self.pairs: tuple[Tensor, ...] = ()
        if inputs.pair is not None:
            # an additional row, whose P is 0, represents "no target"
            pair, num_rows = inputs.pair, self.features.shape[0]
            self.features = torch.cat([self.features, self.features.new_zeros(1, self.features.shape[1])])
            self.row = torch.cat([self.row, self.row.new_full((1, 1), -torch.inf)])
            self.pairs = torch.where(pair >= 0, pair, num_rows).unbind(1)
        self.buffer = Buffer(self.features.shape[0], inputs.chunk, self.features)

    def chunk(self, part: slice) -> Tensor:
        """Return ``[N, chunk]``."""
        bias, out = self.column[part], self.buffer.view(part)
        entries = scaled_logits(self.features, self.weight[part], self.temperature, bias, out)
        entries.add_(self.row).exp_()
        if not self.pairs:
            return entries
        target = entries.index_select(0, self.pairs[0])
        for pair in self.pairs[1:]:
            target += entries.index_select(0, pair)
        return target
