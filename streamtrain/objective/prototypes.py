"""Cross-entropy against prototype assignments without ever holding ``[N, K]`` logits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from streamtrain.objective.logits import Buffer, chunk_rows, chunks, fused, matmul, row_log_sum_exp, scaled_logits
from streamtrain.objective.sinkhorn import Assignment


class WeightHandle(Protocol):
    """A way to the teacher's prototypes that hides the tensor from a sharded engine's hooks.

    ZeRO-3 detaches tensor arguments of a module, also inside tuples and dicts; a parameter passed so would
    lose what is needed to gather it.
    """

    def gathered(self) -> AbstractContextManager[Tensor]:
        """A context within which the whole weight ``[num_prototypes, bottleneck]`` can be read."""
        ...


@dataclass(frozen=True)
class PlainWeight:
    """The handle of a weight that is whole anyway."""

    weight: Tensor

    def gathered(self) -> AbstractContextManager[Tensor]:
        return _Opened(self.weight.detach())


class _Opened(AbstractContextManager[Tensor]):
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __enter__(self) -> Tensor:
        return self.weight

    def __exit__(self, *_: object) -> None:
        return None


@dataclass(frozen=True)
class PrototypeTargets:
    """What the student rows of one micro-batch are to match; called with ``(features, weight)``."""

    # teacher bottlenecks [M, d] of this micro-batch and their assignment
    features: Tensor
    assignment: Assignment
    handle: WeightHandle
    # int64 [N, J]: teacher rows whose mean is the target of a student row; −1: none. None: row i for row i
    pair: Tensor | None
    # [N]: what each student row counts
    row_weight: Tensor
    student_temperature: float
    teacher_temperature: float
    # upper bound of one chunk's fp32 logits, student and teacher rows together
    chunk_bytes: int

    def __call__(self, student_features: Tensor, student_weight: Tensor) -> Tensor:
        """The loss of ``student_features [N, d]`` under ``student_weight [K, d]``: scalar."""
        num_rows = student_features.shape[0] + self.features.shape[0]
        with self.handle.gathered() as teacher_weight:
            return prototype_cross_entropy(
                student_features,
                student_weight,
                self.features,
                teacher_weight,
                self.assignment,
                self.pair,
                self.row_weight,
                self.student_temperature,
                self.teacher_temperature,
                chunk_rows(self.chunk_bytes, num_rows, student_weight.shape[0]),
            )


def prototype_cross_entropy(
    student_features: Tensor,
    student_weight: Tensor,
    teacher_features: Tensor,
    teacher_weight: Tensor,
    assignment: Assignment,
    pair: Tensor | None,
    row_weight: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    chunk: int,
) -> Tensor:
    """``Σ_i row_weight_i · H(mean_j P[pair_ij], softmax(z_i Wᵀ / τ_s))``, differentiable in ``z`` and ``W``.

    Both gradients are formed in the forward, chunk by chunk of prototypes, and only scaled in the backward,
    so that neither logits nor targets outlive a chunk.

    Args:
        student_features: ``z [N, d]``; N may be 0.
        student_weight: ``W [K, d]``.
        teacher_features: ``[M, e]``; a teacher of another size may have another bottleneck.
        teacher_weight: ``[K, e]``.
        assignment: of the teacher rows; together with the two above it gives ``P [M, K]``.
        pair: int64 ``[N, J]``, rows of ``P`` (−1: none); the target is the mean over those given. None: N = M
            and each row has its own.
        row_weight: ``[N]``.
        student_temperature: τ_s.
        teacher_temperature: the one the assignment was made with.
        chunk: prototypes a chunk.

    Returns:
        fp32 (fp64 for fp64 features) scalar.
    """
    # the sharded engine leaves an empty tensor where a weight is not gathered, and an empty loss would be 0
    assert student_weight.shape[0] > 0, "the student's prototypes are not gathered here"
    assert teacher_weight.shape[0] == student_weight.shape[0], "the teacher's prototypes are not gathered here"
    assert pair is not None or student_features.shape[0] == teacher_features.shape[0]
    inputs = (teacher_features, teacher_weight, assignment, pair, row_weight)
    return _PrototypeCrossEntropy.apply(
        student_features, student_weight, *inputs, student_temperature, teacher_temperature, chunk
    )


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_features: Tensor, student_weight: Tensor, *rest: Any) -> Tensor:
        inputs = _Inputs(student_features, student_weight, *rest)
        loss, gradients = _sweep(inputs, need_gradient=any(ctx.needs_input_grad[:2]))
        # a plain attribute, so that the backward can free them before it returns
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "this loss keeps its gradients for one backward only"
        return *(gradient.mul_(grad_output.to(gradient.dtype)) for gradient in gradients), *([None] * 8)


class _Inputs(NamedTuple):
    """Those of ``prototype_cross_entropy``."""

    features: Tensor
    weight: Tensor
    teacher_features: Tensor
    teacher_weight: Tensor
    assignment: Assignment
    pair: Tensor | None
    row_weight: Tensor
    student_temperature: float
    teacher_temperature: float
    chunk: int


def _sweep(inputs: _Inputs, *, need_gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Loss and both gradients: one sweep for the softmax' normaliser, one for everything else."""
    features, weight, teacher_features, teacher_weight, assignment, pair, row_weight = inputs[:7]
    student_temperature, teacher_temperature, chunk = inputs[7:]
    log_normaliser = row_log_sum_exp(features, weight, student_temperature, chunk)
    row_weight = row_weight.to(log_normaliser.dtype)
    # what the target row counts in all (0 where a student row has no target), and each of its parts
    count = torch.ones_like(row_weight) if pair is None else (pair >= 0).sum(1)
    target_total = (count > 0).to(log_normaliser.dtype)
    target_scale = target_total / count.clamp_min(1)
    # exp(logits - this) is the softmax times what the row counts; a row that counts nothing has inf here
    softmax_shift = log_normaliser - (row_weight * target_total / student_temperature).log()
    target_factor = row_weight * target_scale / student_temperature
    if fused((features, weight), (teacher_features, teacher_weight)):
        if pair is None:
            pair = torch.arange(len(features))[:, None]
        matched, *gradients = torch.ops.streamtrain.cross_entropy(
            features.contiguous(), weight.contiguous(), student_temperature, softmax_shift, target_factor,
            teacher_features.contiguous(), teacher_weight.contiguous(), teacher_temperature,
            assignment.column.float(), assignment.row.float(), pair.contiguous(), need_gradient,
        )  # fmt: skip
    else:
        matched, *gradients = _chunked(inputs, softmax_shift[:, None], target_factor[:, None], need_gradient)
    loss = (row_weight * (target_total * log_normaliser - target_scale * matched)).sum()
    if not gradients:
        return loss, None
    features_gradient, weight_gradient = gradients
    return loss, (features_gradient.to(features.dtype), weight_gradient)


def _chunked(inputs: _Inputs, softmax_shift: Tensor, target_factor: Tensor, need_gradient: bool) -> list[Tensor]:
    """What needs the logits of both, a chunk at a time.

    Returns:
        ``Σ_k target_ik · logit_ik [N]``, the targets summed over the pairs; with ``need_gradient`` also
        ``exp(logits − shift) − factor · target`` times the prototypes, and transposed times the features.
    """
    features, weight, teacher_features, teacher_weight, assignment, pair = inputs[:6]
    student_temperature, teacher_temperature, chunk = inputs[7:]
    targets = _Targets(teacher_features, teacher_weight, assignment, pair, teacher_temperature, chunk)
    matched = torch.zeros_like(softmax_shift[:, 0])
    features_gradient = torch.zeros_like(features, dtype=matched.dtype) if need_gradient else None
    weight_gradient = torch.empty_like(weight) if need_gradient else None
    student_buffer, product_buffer = (Buffer(features.shape[0], chunk, features) for _ in range(2))
    for part in chunks(weight.shape[0], chunk):
        logits = scaled_logits(features, weight[part], student_temperature, out=student_buffer.of(part))
        target = targets.chunk(part)
        matched += torch.mul(target, logits, out=product_buffer.of(part)).sum(1)
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

    Rows of P are gathered: a dense ``[N, M]`` mixing matrix would cost ``N · M · K``, which for patches, each
    with a target of its own, is more than the logits themselves.
    """

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        assignment: Assignment,
        pair: Tensor | None,
        temperature: float,
        chunk: int,
    ) -> None:
        self.weight, self.column, self.temperature = weight, assignment.column, temperature
        self.features, self.row = features, assignment.row[:, None]
        self.pairs: tuple[Tensor, ...] = ()
        if pair is not None:
            # one more row, whose P is 0, stands for "no target"
            self.features = torch.cat([features, features.new_zeros(1, features.shape[1])])
            self.row = torch.cat([self.row, self.row.new_full((1, 1), -torch.inf)])
            self.pairs = torch.where(pair >= 0, pair, features.shape[0]).unbind(1)
        self.buffer = Buffer(self.features.shape[0], chunk, features)

    def chunk(self, part: slice) -> Tensor:
        """``[N, chunk]``."""
        out = self.buffer.of(part)
        entries = scaled_logits(self.features, self.weight[part], self.temperature, self.column[part], out)
        entries.add_(self.row).exp_()
        if not self.pairs:
            return entries
        target = entries.index_select(0, self.pairs[0])
        for pair in self.pairs[1:]:
            target += entries.index_select(0, pair)
        return target
