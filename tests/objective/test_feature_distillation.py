"""Losses of feature distillation against plain formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from streamtrain.objective.feature_distillation import local_view_loss, same_view_loss, token_distance


def rows(seed: int, count: int, dim: int = 12) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distances_equal_their_formulas() -> None:
    student, teacher = rows(0, 7), 30 * rows(1, 7) + 5
    cosine = token_distance("cosine", student, teacher)
    torch.testing.assert_close(cosine, 1 - (F.normalize(student, dim=1) * F.normalize(teacher, dim=1)).sum(1))
    standard = (teacher - teacher.mean(1, keepdim=True)) / teacher.std(1, correction=0, keepdim=True)
    expected = F.smooth_l1_loss(student, standard, reduction="none").mean(1)
    torch.testing.assert_close(token_distance("smooth_l1", student, teacher), expected, rtol=1e-6, atol=1e-6)
    # neither depends on the scale of the teacher's features
    for kind in ("cosine", "smooth_l1"):
        before, after = (token_distance(kind, student, scale * teacher) for scale in (1.0, 9.0))
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "smooth_l1"])
def test_each_local_view_is_compared_with_every_global_view_of_its_image(kind: str) -> None:
    local, full = rows(2, 3 * 4), rows(3, 2 * 4)
    pairs = [
        token_distance(kind, local[view * 4 + image], full[other * 4 + image])
        for view in range(3) for other in range(2) for image in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(local_view_loss(kind, local, full, images=4), torch.stack(pairs).mean())


def test_bf16_features_give_an_fp32_loss_and_a_zero_token_a_finite_gradient() -> None:
    student = rows(4, 5).bfloat16().requires_grad_()
    for kind in ("cosine", "smooth_l1"):
        loss = same_view_loss(kind, student * torch.tensor([[0.0], *[[1.0]] * 4]), rows(5, 5).bfloat16())
        assert loss.dtype == torch.float32
        loss.backward()
        assert student.grad is not None and student.grad.isfinite().all()
