"""The chunked cross-entropy against whole logits and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamtrain.objective.prototypes import PlainWeight, PrototypeTargets, prototype_cross_entropy, prototype_mass
from streamtrain.objective.sinkhorn import Assignment, sinkhorn
from streamtrain.ops.chunks import chunk_rows

STUDENT, TEACHER = 0.1, 0.05


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(random(*shape, seed=seed), dim=-1)


def reference(z: Tensor, weight: Tensor, target: Tensor, pair: Tensor, row_weight: Tensor) -> Tensor:
    """``Σ_i w_i H(mean over the given pairs of P, softmax(z_i Wᵀ / τ_s))``, row by row."""
    log_p = (z @ weight.T / STUDENT).log_softmax(1)
    loss = (z * 0).sum() + (weight * 0).sum()
    for row, pairs in enumerate(pair.tolist()):
        chosen = [target[index] for index in pairs if index >= 0]
        if chosen:
            loss = loss - row_weight[row] * (torch.stack(chosen).mean(0) * log_p[row]).sum()
    return loss


def probabilities(features: Tensor, weight: Tensor, assignment: Assignment) -> Tensor:
    return (features @ weight.T / TEACHER + assignment.column + assignment.row[:, None]).exp()


@settings(max_examples=40, deadline=None)
@given(
    num_student=st.integers(0, 8),
    num_teacher=st.integers(1, 6),
    pairs=st.integers(1, 3),
    num_prototypes=st.integers(1, 40),
    chunk=st.integers(1, 50),
    scale=st.sampled_from([0.0, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_equal_the_plain_form(
    num_student: int, num_teacher: int, pairs: int, num_prototypes: int, chunk: int, scale: float, seed: int
) -> None:
    z, weight = unit(num_student, 5, seed=seed), scale * random(num_prototypes, 5, seed=seed + 1)
    teacher, teacher_weight = unit(num_teacher, 5, seed=seed + 2), scale * random(num_prototypes, 5, seed=seed + 3)
    draw = torch.Generator().manual_seed(seed)
    pair = torch.randint(-1, num_teacher, (num_student, pairs), generator=draw)
    row_weight = torch.rand(num_student, dtype=torch.float64, generator=draw)
    assignment = sinkhorn(teacher, teacher_weight, TEACHER, 3, 7)
    target = probabilities(teacher, teacher_weight, assignment)

    grads, losses = [], []
    for is_chunked in (True, False):
        student = z.clone().requires_grad_()
        prototypes = weight.clone().requires_grad_()
        if is_chunked:
            loss = prototype_cross_entropy(
                student, prototypes, teacher, teacher_weight, assignment, pair, row_weight, STUDENT, TEACHER, chunk
            )
        else:
            loss = reference(student, prototypes, target, pair, row_weight)
        (3.0 * loss).backward()
        losses.append(loss.detach())
        grads.append((student.grad, prototypes.grad))
    torch.testing.assert_close(losses[0], losses[1])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_error_against_float64(dtype: torch.dtype, tolerance: float) -> None:
    z, weight = unit(24, 16).to(dtype), (0.2 * random(301, 16, seed=1)).to(dtype)
    teacher, teacher_weight = unit(12, 16, seed=2).to(dtype), (0.2 * random(301, 16, seed=3)).to(dtype)
    pair = torch.arange(24)[:, None] % 12
    row_weight = torch.full((24,), 1 / 24)
    assignment = sinkhorn(teacher, teacher_weight, TEACHER, 3, 64)
    exact = sinkhorn(teacher.double(), teacher_weight.double(), TEACHER, 3, 64)
    target = probabilities(teacher.double(), teacher_weight.double(), exact)

    student, prototypes = z.clone().requires_grad_(), weight.clone().requires_grad_()
    targets = PrototypeTargets(
        teacher, assignment, PlainWeight(teacher_weight), pair, row_weight, STUDENT, TEACHER, chunk_bytes=2**14
    )
    loss = targets(student, prototypes)
    loss.backward()
    plain = z.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference(*plain, target, pair, row_weight.double())
    expected.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < tolerance * abs(expected.item())
    for got, want in zip((student, prototypes), plain, strict=True):
        assert got.grad is not None and want.grad is not None and got.grad.dtype == dtype
        assert (got.grad.double() - want.grad).norm() < tolerance * want.grad.norm()


def test_one_target_per_row_from_a_wider_teacher() -> None:
    z, weight = unit(6, 4).requires_grad_(), random(30, 4, seed=1).requires_grad_()
    teacher, teacher_weight = unit(6, 7, seed=2), random(30, 7, seed=3)
    assignment = sinkhorn(teacher, teacher_weight, TEACHER, 3, 8)
    row_weight = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pair = torch.arange(6)[:, None]
    expected = reference(z, weight, probabilities(teacher, teacher_weight, assignment), pair, row_weight)
    expected_gradients = torch.autograd.grad(expected, (z, weight))
    for pairs in (None, pair):
        rest = assignment, pairs, row_weight, STUDENT, TEACHER, 8
        got = prototype_cross_entropy(z, weight, teacher, teacher_weight, *rest)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, (z, weight)), expected_gradients)


def test_rows_of_weight_zero_and_padding_have_no_gradient() -> None:
    z, weight = unit(6, 4).float().requires_grad_(), random(30, 4, seed=1).float()
    teacher = unit(6, 4, seed=2).float()
    valid = torch.tensor([True, True, True, True, False, False])
    assignment = sinkhorn(teacher, weight, TEACHER, 3, 8, valid=valid)
    arguments = torch.arange(6)[:, None], valid.float(), STUDENT, TEACHER, 8
    loss = prototype_cross_entropy(z, weight, teacher, weight, assignment, *arguments)
    loss.backward()
    assert loss.isfinite() and z.grad is not None and z.grad[:4].any() and not z.grad[4:].any()


def test_hundredfold_logits_stay_finite() -> None:
    z, weight = unit(6, 4).bfloat16().requires_grad_(), (100 * random(30, 4, seed=1)).bfloat16().requires_grad_()
    teacher = unit(6, 4, seed=2).bfloat16()
    assignment = sinkhorn(teacher, weight.detach(), 0.04, 3, 8)
    loss = prototype_cross_entropy(
        z, weight, teacher, weight.detach(), assignment, torch.arange(6)[:, None], torch.ones(6), STUDENT, 0.04, 8
    )
    loss.backward()
    assert loss.isfinite() and z.grad is not None and z.grad.isfinite().all()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_a_weight_that_is_not_gathered_raises() -> None:
    z, weight, empty = unit(2, 4), random(5, 4), random(0, 4)
    assignment = sinkhorn(z, weight, TEACHER, 1, 5)
    rest = torch.zeros(2, 1, dtype=torch.long), torch.ones(2), STUDENT, TEACHER, 5
    for student_weight, teacher_weight in ((empty, weight), (weight, empty)):
        with pytest.raises(AssertionError, match="not gathered"):
            prototype_cross_entropy(z, student_weight, z, teacher_weight, assignment, *rest)


def test_chunks_respect_their_bytes() -> None:
    assert chunk_rows(2**20, num_rows=100, num_prototypes=65536) == 2**20 // 400 // 64 * 64
    assert chunk_rows(2**20, num_rows=0, num_prototypes=100) == 100
    # never below one tile of a matrix unit
    assert chunk_rows(1, num_rows=10**6, num_prototypes=65536) == 64


def test_mass_is_the_mean_softmax_times_the_prototypes() -> None:
    generator = torch.Generator().manual_seed(0)
    features, weight = torch.randn(7, 5, generator=generator), torch.randn(200, 5, generator=generator)
    # chunks of 64 prototypes
    mass = prototype_mass(features, PlainWeight(weight), 0.5, chunk_bytes=4 * 7 * 64)
    expected = (features @ weight.T / 0.5).softmax(1).mean(0) * 200
    torch.testing.assert_close(mass, expected)
