"""The CPU kernels of logits, Sinkhorn and the prototype loss against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cpu_kernels import DTYPES, for_each_dtype, needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_processes import run_on_ranks
from torch import Tensor

from streamtrain.objective.prototypes import prototype_cross_entropy
from streamtrain.objective.sinkhorn import Assignment, centered_softmax, sinkhorn
from streamtrain.ops import logits as logits_module
from streamtrain.ops.logits import row_log_sum_exp, scaled_logits, uses_kernels

pytestmark = needs_kernels

STUDENT, TEACHER = 0.1, 0.05
# relative rounding error of stored values
ROUGH = {torch.bfloat16: 5e-3, torch.float32: 5e-6}


def unit(*shape: int, seed: int, dtype: torch.dtype = DTYPES[0] if DTYPES else torch.float32) -> Tensor:
    draw = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(draw, dim=-1).to(dtype)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


def assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, want in zip(got, expected, strict=True):
        assert distance(mine, want) < tolerance


@given(
    rows=st.integers(0, 300), prototypes=st.integers(1, 400), dim=st.sampled_from([32, 64, 96]),
    threads=st.sampled_from([1, 2]), seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES or [torch.float32]),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_logits_and_their_sums(
    rows: int, prototypes: int, dim: int, threads: int, seed: int, dtype: torch.dtype
) -> None:
    features, weight = (unit(count, dim, seed=seed + i, dtype=dtype) for i, count in enumerate((rows, prototypes)))
    draw = torch.Generator().manual_seed(seed)
    column = torch.randn(prototypes, generator=draw) - 8
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain = scaled_logits(features, weight, 0.07)
        scaled = scaled_logits(features, weight, 0.07, column)
        sums = row_log_sum_exp(features, weight, 0.07, 64, column)
    finally:
        torch.set_num_threads(before)
    want = features.double() @ weight.double().T / 0.07
    assert distance(plain, want) < 1e-6
    assert distance(scaled, want + column) < 1e-6
    assert distance(sums, (want + column).logsumexp(1)) < 1e-6


def both_forms(
    features: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, pair: Tensor | None, row_weight: Tensor,
    valid: Tensor | None = None, temperature: float = TEACHER,
) -> list[list[Tensor]]:  # fmt: skip
    """Return loss and gradients of the kernels, and of the chunked PyTorch form in float64."""
    assert uses_kernels((features, weight), (teacher, teacher_weight))
    assignment = sinkhorn(teacher.double(), teacher_weight.double(), temperature, 3, 64, valid=valid)
    results = []
    for dtype in (features.dtype, torch.float64):
        z, w = (each.detach().to(dtype, copy=True).requires_grad_() for each in (features, weight))
        loss = prototype_cross_entropy(
            z, w, teacher.to(dtype), teacher_weight.to(dtype), assignment, pair, row_weight.double(), STUDENT,
            temperature, 64,
        )  # fmt: skip
        (2.0 * loss).backward()
        assert z.grad is not None and w.grad is not None
        results.append([loss.detach().double(), z.grad.double(), w.grad.double()])
    return results


@pytest.mark.usefixtures("threads")
@for_each_dtype
@pytest.mark.parametrize("valid_rows", [12, 5, 0])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("teacher_dim", [32, 64])
def test_the_loss_and_its_gradients(paired: bool, valid_rows: int, teacher_dim: int, dtype: torch.dtype) -> None:
    rows = 24 if paired else 12
    shapes = ((rows, 32), (301, 32), (12, teacher_dim), (301, teacher_dim))
    features, weight, teacher, teacher_weight = (unit(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    pair = torch.randint(-1, 12, (24, 3), generator=torch.Generator().manual_seed(3)) if paired else None
    row_weight = torch.rand(rows, generator=torch.Generator().manual_seed(4)) / rows
    row_weight[:3] = 0
    valid = torch.arange(12) < valid_rows
    got, expected = both_forms(features, weight, teacher, teacher_weight, pair, row_weight, valid)
    assert_near(got, expected, ROUGH[dtype])


@pytest.mark.usefixtures("threads")
@for_each_dtype
def test_more_rows_than_a_block(dtype: torch.dtype) -> None:
    rows = 600
    factors = [unit(count, 64, seed=i, dtype=dtype) for i, count in enumerate((rows, 200, rows, 200))]
    got, expected = both_forms(*factors, None, torch.ones(rows) / rows)
    assert_near(got, expected, ROUGH[dtype])


@for_each_dtype
def test_logits_of_hundreds_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    features, weight, teacher = (unit(count, 32, seed=i, dtype=dtype) for i, count in enumerate((6, 70, 6)))
    weight *= 40
    got, expected = both_forms(features, weight, teacher, weight, None, torch.ones(6))
    # the relative error of an exponential is the absolute error of its exponent
    assert_near(got, expected, max(ROUGH[dtype], 1e-4))


@pytest.mark.parametrize("noise", [3.0, 0.5, 0.05])
@pytest.mark.parametrize("temperature", [0.1, 0.07, 0.04])
def test_a_student_near_its_teacher_has_accurate_gradients(noise: float, temperature: float) -> None:
    features, weight = unit(16, 64, seed=0), unit(1024, 64, seed=1)
    other = unit(16, 64, seed=2).double()
    teacher = torch.nn.functional.normalize(features.double() + noise * other, dim=-1).to(features.dtype)
    got, expected = both_forms(features, weight, teacher, weight, None, torch.ones(16), temperature=temperature)
    assert_near(got, expected, 1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoilt", range(4))
def test_non_finite_inputs_make_the_loss_non_finite(spoilt: int, value: float) -> None:
    tensors = [unit(6, 32, seed=0), unit(70, 32, seed=1), unit(6, 32, seed=2), unit(70, 32, seed=1)]
    tensors[spoilt][2, 3] = value
    for assign in (
        sinkhorn(tensors[2], tensors[3], TEACHER, 3, 64),
        centered_softmax(tensors[2], tensors[3], torch.zeros(70), TEACHER, 64),
    ):
        student = [each.clone().requires_grad_() for each in tensors[:2]]
        loss = prototype_cross_entropy(*student, *tensors[2:], assign, None, torch.ones(6), STUDENT, TEACHER, 64)
        assert not loss.isfinite()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("far_below", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("valid_rows", [40, 33, 0])
def test_sinkhorn_equals_float64(valid_rows: int, scale: float, far_below: bool) -> None:
    features, weight = unit(40, 64, seed=0), scale * unit(500, 64, seed=1)
    if far_below:
        # the first row's exponentials vanish beside the others' in every column
        features, weight = features.abs(), weight.abs()
        features[0] *= -1
    valid = torch.arange(40) < valid_rows
    got, want = (
        sinkhorn(features.to(kind), weight.to(kind), TEACHER, 3, 96, valid=valid)
        for kind in (features.dtype, torch.float64)
    )

    def assigned(found: Assignment) -> Tensor:
        return (features.double() @ weight.double().T / TEACHER + found.column + found.row[:, None]).exp()

    assert distance(assigned(got), assigned(want)) < 1e-4


def test_sinkhorn_over_ranks_equals_one_rank_with_all_rows(tmp_path: Path) -> None:
    run_on_ranks(_sinkhorn_over_ranks, tmp_path)


def _sinkhorn_over_ranks(rank: int) -> None:
    features, weight = unit(40, 64, seed=0), 20 * unit(300, 64, seed=1)
    for cut, valid_rows in ((25, 40), (25, 20), (40, 33)):
        valid, mine = torch.arange(40) < valid_rows, slice(None, cut) if rank == 0 else slice(cut, None)
        with mock.patch.object(dist, "get_world_size", return_value=1):
            whole = sinkhorn(features.double(), weight.double(), TEACHER, 3, 96, valid)
        got = sinkhorn(features[mine], weight, TEACHER, 3, 96, valid[mine])
        assert distance(got.column.exp(), whole.column.exp()) < 1e-4
        assert distance(got.row.exp(), whole.row[mine].exp()) < 1e-4


def test_inputs_need_not_be_contiguous() -> None:
    features, weight = unit(6, 32, seed=0), unit(70, 32, seed=1)
    turned = [each.T.contiguous().T for each in (features, weight)]
    assert torch.equal(scaled_logits(*turned, 0.1), scaled_logits(features, weight, 0.1))
    assert torch.equal(row_log_sum_exp(*turned, 0.1, 64), row_log_sum_exp(features, weight, 0.1, 64))


def test_rows_of_weight_zero_have_no_gradient() -> None:
    features, weight, teacher = unit(4, 32, seed=0), unit(70, 32, seed=1), unit(4, 32, seed=2)
    got, _ = both_forms(features, weight, teacher, weight, None, torch.zeros(4))
    assert not any(bool(each.any()) for each in got)


def test_no_rows_at_all() -> None:
    features, weight = unit(0, 32, seed=0), unit(70, 32, seed=1)
    (loss, *gradients), _ = both_forms(features, weight, features, weight, None, torch.ones(0))
    assert float(loss) == 0.0 and not any(bool(each.any()) for each in gradients)


def test_other_dtypes_shapes_and_devices_use_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros(3, 32, dtype=DTYPES[0])
    assert uses_kernels((zeros, zeros))
    for other in (zeros.double(), zeros.half(), zeros.to("meta"), zeros[:, :8]):
        assert not uses_kernels((zeros, zeros), (other, other)) and not uses_kernels((other, other))
    monkeypatch.setattr(logits_module, "is_enabled", lambda dtype: False)
    assert not uses_kernels((zeros, zeros))
