"""The loss of 16-bit features on a CPU against whole logits and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamtrain.objective import as_attention
from streamtrain.objective.prototypes import prototype_cross_entropy
from streamtrain.objective.sinkhorn import centered_softmax, sinkhorn

STUDENT, TEACHER = 0.1, 0.05


def unit(*shape: int, seed: int) -> Tensor:
    draw = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(draw, dim=-1)


def both_forms(
    monkeypatch: pytest.MonkeyPatch, features: Tensor, weight: Tensor, teacher: Tensor, pair: Tensor | None,
    row_weight: Tensor, valid: Tensor | None = None,
) -> list[list[Tensor]]:  # fmt: skip
    """Loss and gradients in bf16 as attention, and in float64 chunk by chunk of prototypes."""
    results = []
    used: list[bool] = []
    suits = as_attention.suits
    monkeypatch.setattr(as_attention, "suits", lambda *tensors: used.append(suits(*tensors)) or used[-1])
    for dtype in (torch.bfloat16, torch.float64):
        z, w, t = (each.bfloat16().to(dtype).requires_grad_() for each in (features, weight, teacher))
        prototypes = (0.9 * w.detach()).bfloat16().to(dtype)
        assignment = sinkhorn(t.detach().double(), prototypes.double(), TEACHER, 3, 64, valid=valid)
        loss = prototype_cross_entropy(
            z, w, t.detach(), prototypes, assignment, pair, row_weight.double(), STUDENT, TEACHER, 64
        )
        (2.0 * loss).backward()
        assert z.grad is not None and w.grad is not None
        results.append([loss.detach().double(), z.grad.double(), w.grad.double()])
    assert used == [True, False]
    return results


@pytest.mark.parametrize("valid_rows", [12, 5, 0])
@pytest.mark.parametrize("paired", [True, False])
def test_both_forms_agree(monkeypatch: pytest.MonkeyPatch, paired: bool, valid_rows: int) -> None:
    rows = 24 if paired else 12
    features, weight, teacher = unit(rows, 16, seed=0), unit(301, 16, seed=1), unit(12, 16, seed=2)
    pair = torch.randint(-1, 12, (24, 3), generator=torch.Generator().manual_seed(3)) if paired else None
    row_weight = torch.rand(rows, generator=torch.Generator().manual_seed(4)) / rows
    row_weight[:3] = 0
    valid = torch.arange(12) < valid_rows
    got, expected = both_forms(monkeypatch, features, weight, teacher, pair, row_weight, valid)
    for mine, want in zip(got, expected, strict=True):
        assert float((mine - want).norm()) <= 1e-2 * float(want.norm())


def test_logits_of_hundreds_neither_overflow_nor_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    features, weight, teacher = unit(6, 16, seed=0), 40 * unit(70, 16, seed=1), unit(6, 16, seed=2)
    got, expected = both_forms(monkeypatch, features, weight, teacher, None, torch.ones(6))
    for mine, want in zip(got, expected, strict=True):
        assert float((mine - want).norm()) <= 1e-2 * float(want.norm())


@pytest.mark.parametrize("noise", [3.0, 0.5, 0.05])
@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.04])
def test_a_student_near_its_teacher_has_exact_gradients_too(noise: float, temperature: float) -> None:
    """Where those of the two are nearly equal, averages that are rounded one by one would leave noise."""
    features, weight = unit(16, 64, seed=0), unit(1024, 64, seed=1)
    teacher = torch.nn.functional.normalize(features + noise * unit(16, 64, seed=2), dim=-1)
    z, w, t = (each.bfloat16() for each in (features, weight, teacher))
    assignment = sinkhorn(t.double(), w.double(), temperature, 3, 64)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        ours = [each.detach().to(dtype).requires_grad_() for each in (z, w)]
        prototype_cross_entropy(
            *ours, t.to(dtype), w.to(dtype), assignment, None, torch.ones(16), STUDENT, temperature, 64
        ).backward()
        found.append([each.grad.double() for each in ours if each.grad is not None])
    for mine, want in zip(*found, strict=True):
        assert float((mine - want).norm()) <= 1e-2 * float(want.norm())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoilt", range(4))
def test_what_is_not_finite_shows_in_the_loss(spoilt: int, value: float) -> None:
    tensors = [each.bfloat16() for each in (unit(6, 16, seed=0), unit(70, 16, seed=1), unit(6, 16, seed=2))]
    tensors.append(tensors[1].clone())
    tensors[spoilt][2, 3] = value
    for assign in (
        sinkhorn(tensors[2].double(), tensors[3].double(), TEACHER, 3, 64),
        centered_softmax(tensors[2].double(), tensors[3].double(), torch.zeros(70, dtype=torch.float64), TEACHER, 64),
    ):
        student = [each.requires_grad_() for each in tensors[:2]]
        loss = prototype_cross_entropy(*student, *tensors[2:], assign, None, torch.ones(6), STUDENT, TEACHER, 64)
        assert not loss.isfinite()


def test_rows_need_not_be_dense() -> None:
    features, weight = unit(6, 16, seed=0).bfloat16(), unit(70, 16, seed=1).bfloat16()
    turned = [each.T.contiguous().T for each in (features, weight)]
    for mine, want in zip(
        as_attention.average(*turned, turned[1], STUDENT), as_attention.average(features, weight, weight, STUDENT),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(mine, want)


def test_rows_that_count_nothing_leave_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    features, weight, teacher = unit(4, 16, seed=0), unit(70, 16, seed=1), unit(4, 16, seed=2)
    got, _ = both_forms(monkeypatch, features, weight, teacher, None, torch.zeros(4))
    assert not any(bool(each.any()) for each in got)


def test_other_types_shapes_and_devices_keep_the_other_form() -> None:
    half, wide = torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(3, 16, dtype=torch.bfloat16)
    assert as_attention.suits(half, half)
    assert not as_attention.suits(half, wide) and not as_attention.suits(half, half.float())
    assert not as_attention.suits(half.to("meta"), half.to("meta"))
