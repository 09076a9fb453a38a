"""Patch losses against their formulas, patch by patch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamtrain.objective.patches import cosine_loss, l2_loss


def rows(seed: int, count: int = 7) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    return sum((a - b) ** 2 for a, b in zip(student, teacher, strict=True))  # type: ignore[return-value]


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - student.dot(teacher) / (student.dot(student).sqrt() * teacher.dot(teacher).sqrt())


@pytest.mark.parametrize(("loss", "formula"), [(l2_loss, l2), (cosine_loss, cosine)])
def test_value_and_gradient(loss: object, formula: object) -> None:
    assert callable(loss) and callable(formula)
    student, teacher = rows(0).requires_grad_(), rows(1)
    weight = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.75, 0.0, 0.0], dtype=torch.float64)
    expected = torch.stack([w * formula(s, t) for w, s, t in zip(weight, student, teacher, strict=True)]).sum()
    got = loss(student, teacher, weight)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("loss", [l2_loss, cosine_loss])
def test_edges_in_bf16(loss: object) -> None:
    assert callable(loss)
    for student, teacher in (
        (rows(0), rows(0)),
        (torch.zeros(3, 6), rows(1, 3)),
        (rows(0, 0), rows(1, 0)),
        (1e4 * rows(0), rows(1)),
    ):
        student = student.bfloat16().requires_grad_()
        value = loss(student, teacher.bfloat16(), torch.ones(len(student)))
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite()
        assert student.grad is not None and student.grad.isfinite().all()
