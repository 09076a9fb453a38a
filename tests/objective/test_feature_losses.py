"""KoLeo and the patch losses against their formulas in float64, and where KoLeo's formula has no value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_processes import run_on_ranks
from torch import Tensor

from streamtrain.objective.feature_losses import cosine_loss, distributed_koleo_loss, koleo_loss, l2_loss


def reference(features: Tensor, neighbours: int = 1) -> Tensor:
    """``−mean log ‖x_i − x_j‖`` over the nearest j of each i, by an exhaustive search."""
    unit = [row / row.dot(row).sqrt() for row in features]
    nearest = []
    for i, a in enumerate(unit):
        distances = torch.stack([(a - b).square().sum().sqrt() for j, b in enumerate(unit) if j != i])
        nearest.append(distances.sort().values[:neighbours])
    return -torch.cat(nearest).log().mean()


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(2, 9), dim=st.integers(2, 12), neighbours=st.integers(1, 4), seed=st.integers(0, 1000))
def test_koleo_value_and_gradient(batch: int, dim: int, neighbours: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, dim, dtype=torch.float64, generator=draw).requires_grad_()
    got, expected = koleo_loss(features, neighbours), reference(features, neighbours)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, features)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0])


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(0, 5), value=st.sampled_from([0.0, 1e-20, 1.0, 1e4]), bf16=st.booleans())
def test_duplicates_and_single_samples_are_finite(batch: int, value: float, bf16: bool) -> None:
    features = torch.full((batch, 8), value, dtype=torch.bfloat16 if bf16 else torch.float32).requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert features.grad is not None and features.grad.isfinite().all()
    assert batch > 1 or loss == 0


@pytest.mark.parametrize("group_size", [0, 2, 4, 8])
def test_groups_on_one_rank(group_size: int) -> None:
    features = _features().requires_grad_()
    expected = torch.stack([reference(part, 2) for part in features.split(group_size or 8)]).mean()
    got = distributed_koleo_loss(features, 2, group_size)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, features)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0])


@pytest.mark.parametrize("group_size", [3, 16])
def test_groups_that_do_not_divide_the_samples_raise(group_size: int) -> None:
    with pytest.raises(ValueError, match="do not form KoLeo groups"):
        distributed_koleo_loss(_features(), 1, group_size)


def test_neighbours_over_ranks(tmp_path: Path) -> None:
    run_on_ranks(_neighbours_over_ranks, tmp_path, ranks=4)


def _neighbours_over_ranks(rank: int) -> None:
    """Check that loss and gradient, averaged over ranks, equal one process with all samples."""
    sent: list[int] = []
    all_gather = dist.all_gather

    def counted(pieces: list[Tensor], *rest: Any) -> None:
        sent.append(len(pieces))
        all_gather(pieces, *rest)

    dist.all_gather = counted
    for group_size in (0, 8, 4, 2, 4):
        everything = _features().requires_grad_()
        expected = torch.stack([reference(part, 2) for part in everything.split(group_size or 8)]).mean()
        expected_gradient = torch.autograd.grad(expected, everything)[0].chunk(4)[rank]
        mine = _features().chunk(4)[rank].clone().requires_grad_()
        loss = distributed_koleo_loss(mine, 2, group_size)
        (gradient,) = torch.autograd.grad(loss, mine)
        torch.testing.assert_close(gradient / 4, expected_gradient)
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / 4, expected.detach())
    # two samples on each rank: only the ranks of a group exchange them
    assert sent == [4, 4, 2, 2]


def _features() -> Tensor:
    return torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def rows(seed: int, count: int = 7) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    return sum((a - b) ** 2 for a, b in zip(student, teacher, strict=True))  # type: ignore[return-value]


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - student.dot(teacher) / (student.dot(student).sqrt() * teacher.dot(teacher).sqrt())


@pytest.mark.parametrize(("loss", "formula"), [(l2_loss, l2), (cosine_loss, cosine)])
def test_patch_loss_value_and_gradient(loss: object, formula: object) -> None:
    assert callable(loss) and callable(formula)
    student, teacher = rows(0).requires_grad_(), rows(1)
    weight = torch.tensor([0.5, 0.5, 1.0, 0.25, 0.75, 0.0, 0.0], dtype=torch.float64)
    expected = torch.stack([w * formula(s, t) for w, s, t in zip(weight, student, teacher, strict=True)]).sum()
    got = loss(student, teacher, weight)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@pytest.mark.parametrize("loss", [l2_loss, cosine_loss])
def test_patch_losses_are_finite_in_bf16(loss: object) -> None:
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
