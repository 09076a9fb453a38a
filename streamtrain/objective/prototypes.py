"""Cross-entropy against prototype assignments, without materialising ``[N, K]`` logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from streamtrain.objective.sinkhorn import Assignment
from streamtrain.ops.chunks import chunk_rows, chunks
from streamtrain.ops.logits import RowLogSumExp, row_log_sum_exp, scaled_logits
from streamtrain.ops.prototypes import CrossEntropyInputs, cross_entropy_sums


class WeightHandle(Protocol):
    """Access to the teacher's prototypes that hides the tensor from a sharded engine's hooks.

    ZeRO-3 detaches tensor arguments of a module, also inside tuples and dicts; a parameter passed as one would lose
    the information needed to gather it.
    """

    def gathered(self) -> AbstractContextManager[Tensor]:
        """Return a context in which the whole weight ``[num_prototypes, bottleneck]`` can be read."""
        ...


@dataclass(frozen=True)
class PlainWeight:
    """The handle of a weight that is not sharded."""

    weight: Tensor

    def gathered(self) -> AbstractContextManager[Tensor]:
        return nullcontext(self.weight.detach())


@dataclass(frozen=True)
class PrototypeTargets:
    """The targets of the student rows of one micro-batch; called with ``(features, weight)``."""

    # teacher bottlenecks [M, d] of this micro-batch and their assignment
    features: Tensor
    assignment: Assignment
    handle: WeightHandle
    # int64 [N, J]: teacher rows whose mean is the target of a student row; −1: none. None: row i for row i
    pair: Tensor | None
    # [N]
    row_weight: Tensor
    student_temperature: float
    teacher_temperature: float
    # bytes of one chunk's fp32 logits, student and teacher rows together; a chunk has at least 64 prototypes
    chunk_bytes: int

    def __call__(self, student_features: Tensor, student_weight: Tensor) -> Tensor:
        """Return the loss of ``student_features [N, d]`` with ``student_weight [K, d]``: scalar."""
        num_rows = student_features.shape[0] + self.features.shape[0]
        with self.handle.gathered() as teacher_weight:
            return prototype_cross_entropy(
                student_features, student_weight, self.features, teacher_weight, self.assignment, self.pair,
                self.row_weight, self.student_temperature, self.teacher_temperature,
                chunk_rows(self.chunk_bytes, num_rows, student_weight.shape[0]),
            )  # fmt: skip


def prototype_cross_entropy(
    student_features: Tensor, student_weight: Tensor, teacher_features: Tensor, teacher_weight: Tensor,
    assignment: Assignment, pair: Tensor | None, row_weight: Tensor, student_temperature: float,
    teacher_temperature: float, chunk: int,
) -> Tensor:  # fmt: skip
    """Return ``Σ_i row_weight_i · H(mean_j P[pair_ij], softmax(z_i Wᵀ / τ_s))``, differentiable in ``z`` and ``W``.

    The forward computes both gradients, chunk by chunk of prototypes, and the backward only scales them, so that
    neither logits nor targets outlive a chunk.

    Args:
        student_features: ``z [N, d]``; N may be 0.
        student_weight: ``W [K, d]``.
        teacher_features: ``[M, e]``; a teacher of another size may have another bottleneck.
        teacher_weight: ``[K, e]``.
        assignment: assignment of the teacher rows; with the two above it defines ``P [M, K]``.
        pair: int64 ``[N, J]``, rows of ``P`` (−1: none); the target is their mean. None: N = M, and row i is the
            target of row i.
        row_weight: ``[N]``.
        student_temperature: τ_s.
        teacher_temperature: the temperature of the assignment.
        chunk: prototypes per chunk.

    Returns:
        fp32 (fp64 for fp64 features) scalar.
    """
    # the sharded engine leaves an empty tensor where a weight is not gathered, and an empty loss would be 0
    assert student_weight.shape[0] > 0, "the student's prototypes are not gathered here"
    assert teacher_weight.shape[0] == student_weight.shape[0], "the teacher's prototypes are not gathered here"
    assert pair is not None or student_features.shape[0] == teacher_features.shape[0]
    return _PrototypeCrossEntropy.apply(
        student_features, student_weight, teacher_features, teacher_weight, assignment.column, assignment.row, pair,
        row_weight, student_temperature, teacher_temperature, chunk,
    )  # fmt: skip


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        loss, gradients = _loss_and_gradients(CrossEntropyInputs(*inputs), any(ctx.needs_input_grad[:2]))
        # a plain attribute, so that the backward can free them before it returns
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "this loss keeps its gradients for one backward only"
        return *(gradient.mul_(grad_output.to(gradient.dtype)) for gradient in gradients), *([None] * 9)


def _loss_and_gradients(inputs: CrossEntropyInputs, need_gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the loss and both gradients: one sweep for the softmax's normaliser, one for everything else."""
    features, weight, pair, temperature = inputs.features, inputs.weight, inputs.pair, inputs.student_temperature
    log_normaliser = row_log_sum_exp(features, weight, temperature, inputs.chunk)
    row_weight = inputs.row_weight.to(log_normaliser.dtype)
    # the total of each target row (0 for a student row without a target) and the share of each of its pairs
    count = torch.ones_like(row_weight) if pair is None else (pair >= 0).sum(1)
    target_total = (count > 0).to(log_normaliser.dtype)
    target_scale = target_total / count.clamp_min(1)
    # exp(logits - softmax_shift) is the softmax times the row's weight; the shift of a row of weight 0 is inf
    softmax_shift = log_normaliser - (row_weight * target_total / temperature).log()
    target_factor = row_weight * target_scale / temperature
    matched, *gradients = cross_entropy_sums(inputs, softmax_shift, target_factor, need_gradient)
    loss = (row_weight * (target_total * log_normaliser - target_scale * matched)).sum()
    if not gradients:
        return loss, None
    features_gradient, weight_gradient = gradients
    return loss, (features_gradient.to(features.dtype), weight_gradient)


@torch.no_grad()
def prototype_mass(features: Tensor, handle: WeightHandle, temperature: float, chunk_bytes: int) -> Tensor:
    """Return how evenly ``features [N, d]`` use the prototypes, before any centring: ``[K]``.

    It is the mean of ``softmax(logits / temperature)`` over the rows, times K: 1 for a prototype of average use.
    """
    with handle.gathered() as weight:
        size = chunk_rows(chunk_bytes, len(features), weight.shape[0])
        normaliser = RowLogSumExp(len(features), features)
        for part in chunks(weight.shape[0], size):
            normaliser.add(scaled_logits(features, weight[part], temperature))
        row = normaliser.value()[:, None]
        return torch.cat(
            [
                scaled_logits(features, weight[part], temperature).sub_(row).exp_().mean(0) * weight.shape[0]
                for part in chunks(weight.shape[0], size)
            ]
        )
