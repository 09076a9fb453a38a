"""The prototype cross-entropy as attention, for 16-bit features on a CPU.

All that the loss and its gradients want are averages of vectors under a softmax over logits of bottlenecks and
prototypes, and its normalisers. That is what a fused attention computes, without ever holding logits; and the one for
CPUs multiplies 16-bit numbers into fp32 logits, for which there is no matrix product of its own: an average, two
products with the exponentials between them, takes two thirds of the time of one product in fp32.

A gradient is the difference of two such averages, the student's and the targets', each of which is rounded to 16 bits:
where the two are nearly equal, what is left is noise. The caller then has to go the other way, which rounds after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from streamtrain.objective.logits import chunks
from streamtrain.objective.sinkhorn import Assignment

# of the averages: a smaller difference has errors of more than 1 %
_LEAST_DIFFERENCE = 0.6


class Inputs(NamedTuple):
    """Those of ``prototype_cross_entropy``, which tells of them."""

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


def suits(*tensors: Tensor) -> bool:
    """Whether bottlenecks and prototypes of these kinds can go this way."""
    return all(each.device.type == "cpu" and each.dtype == torch.bfloat16 for each in tensors) and (
        len({each.shape[1] for each in tensors}) == 1
    )


def average(
    queries: Tensor, keys: Tensor, values: Tensor, temperature: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``values`` averaged under ``softmax(queries @ keys.T / temperature + bias)``.

    Args:
        queries: ``[N, d]``, one an average.
        keys: ``[M, d]``; without any, averages are 0 and log-sums −inf.
        values: ``[M, d]``.
        temperature: of the logits.
        bias: ``[M]``, finite.

    Returns:
        The averages ``[N, d]`` in the values' type and the log-sum-exp of each row ``[N]``, fp32.
    """
    if not len(queries) or not len(keys):
        return torch.zeros_like(queries), torch.full((len(queries),), -torch.inf)
    mask = None if bias is None else bias.float().expand(1, 1, len(queries), -1)
    averages, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        # it takes rows to be dense
        *(each.contiguous()[None, None] for each in (queries, keys, values)), attn_mask=mask, scale=1.0 / temperature
    )  # fmt: skip
    return averages[0, 0], log_sums.flatten().float()


def loss_and_gradients(inputs: Inputs, *, need_gradient: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
    """The loss with its gradients by ``features`` and ``weight``; None where they would not be exact enough."""
    features, weight, teacher_features, teacher_weight, assignment, pair, row_weight = inputs[:7]
    student_temperature, teacher_temperature, chunk = inputs[7:]
    column, row = assignment.column, assignment.row
    valid = ~torch.isneginf(row)
    if pair is None:
        pair = torch.arange(len(features))[:, None]
    count = (pair >= 0).sum(1)
    row_weight = row_weight.float() * (count > 0)
    counted = row_weight > 0
    # the targets' average of the student's prototypes holds all that the loss wants to know of them
    expected = average(teacher_features, teacher_weight, weight, teacher_temperature, column)[0].float()
    expected = torch.where(valid[:, None], expected, 0.0)
    of_rows = _sum_of_pairs(expected, pair) / count.clamp_min(1)[:, None]
    own, log_normaliser = average(features, weight, weight, student_temperature)
    matched = torch.linalg.vecdot(of_rows, features.float()) / student_temperature
    loss = (row_weight * (log_normaliser - matched)).sum()
    # what an infinite logit hides: a row of the teacher's that is not finite must show in the loss
    for each in (teacher_features, teacher_weight):
        loss += 0.0 * each.sum(dtype=torch.float32)
    if not need_gradient:
        return loss, None

    factor = row_weight / student_temperature
    student_sum, target_sum = own.float().mul_(factor[:, None]), of_rows.mul_(factor[:, None])
    features_gradient = student_sum - target_sum
    if features_gradient.norm() < _LEAST_DIFFERENCE * torch.maximum(student_sum.norm(), target_sum.norm()):
        return None
    features_gradient = features_gradient.to(features.dtype)
    # the student rows that each target serves
    share = (factor / count.clamp_min(1))[:, None, None] * (pair >= 0)[:, :, None]
    served = torch.zeros(teacher_features.shape).index_add_(
        0, pair.clamp_min(0).flatten(), (share * features.float()[:, None]).flatten(0, 1)
    )
    served = served[valid].to(features.dtype)
    counted_features, shift = features[counted], factor[counted].log() - log_normaliser[counted]
    targets, target_shift = teacher_features[valid], row[valid]
    weight_gradient = torch.empty_like(weight)
    for part in chunks(len(weight), chunk):
        of_student, size = average(weight[part], counted_features, counted_features, student_temperature, shift)
        of_target, target_size = average(teacher_weight[part], targets, served, teacher_temperature, target_shift)
        gradient = of_student.float().mul_(size.exp()[:, None])
        gradient.addcmul_(of_target.float(), (target_size + column[part]).exp()[:, None], value=-1.0)
        weight_gradient[part] = gradient
    return loss, (features_gradient, weight_gradient)


def _sum_of_pairs(rows: Tensor, pair: Tensor) -> Tensor:
    """``Σ_j rows[pair_ij]``, nothing where ``pair`` is −1."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    # −1 is the last row
    return padded[pair].sum(1)
