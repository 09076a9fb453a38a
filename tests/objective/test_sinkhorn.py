"""Assignments against Sinkhorn-Knopp and softmax written out in float64 on whole matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_processes import run_on_ranks
from torch import Tensor

from streamtrain.objective.sinkhorn import Assignment, centered_softmax, sinkhorn, update_center


def reference(logits: Tensor, iterations: int) -> Tensor:
    """Compute Sinkhorn-Knopp on ``logits / temperature [N, K]`` as in Caron et al. 2020, in float64 logarithms."""
    num_rows, num_prototypes = logits.shape
    log_q = logits.double() - logits.double().flatten().logsumexp(0)
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True) - torch.tensor(float(num_prototypes)).log()
        log_q = log_q - log_q.logsumexp(1, keepdim=True) - torch.tensor(float(num_rows)).log()
    return log_q.exp() * num_rows


def whole(features: Tensor, weight: Tensor, temperature: float, assignment: Assignment) -> Tensor:
    return (features @ weight.T / temperature + assignment.column + assignment.row[:, None]).exp()


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 12),
    num_prototypes=st.integers(1, 40),
    iterations=st.integers(1, 4),
    chunk=st.integers(1, 50),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    temperature=st.sampled_from([0.04, 0.07, 1.0]),
    duplicates=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_sinkhorn_equals_the_plain_form(
    num_rows: int,
    num_prototypes: int,
    iterations: int,
    chunk: int,
    scale: float,
    temperature: float,
    duplicates: bool,
    seed: int,
) -> None:
    features, weight = random(num_rows, 5, seed=seed), scale * random(num_prototypes, 5, seed=seed + 1)
    if duplicates:
        features[:] = features[0]
    assignment = sinkhorn(features, weight, temperature, iterations, chunk)
    got = whole(features, weight, temperature, assignment)
    torch.testing.assert_close(got, reference(features @ weight.T / temperature, iterations), atol=1e-9, rtol=1e-6)


def test_logits_of_a_hundred_at_the_coldest_temperature_stay_finite_in_fp32() -> None:
    features, weight = random(8, 4, dtype=torch.float32), random(64, 4, seed=1, dtype=torch.float32)
    weight *= 100 / (features @ weight.T).abs().max()
    expected = reference(features.double() @ weight.double().T / 0.04, 3)
    assignment = sinkhorn(features, weight, 0.04, 3, 16)
    got = whole(features, weight, 0.04, assignment)
    # for logits near 2500 fp32 has three decimal places
    torch.testing.assert_close(got.double(), expected, atol=5e-3, rtol=0.02)
    torch.testing.assert_close(got.sum(1), torch.ones(8), atol=5e-3, rtol=0)


def test_invalid_rows_are_ignored() -> None:
    features, weight = random(9, 4), random(20, 4, seed=1)
    valid = torch.tensor([True, False, True, True, False, True, True, True, False])
    got = whole(features, weight, 0.1, sinkhorn(features, weight, 0.1, 3, 7, valid=valid))
    torch.testing.assert_close(got[valid], reference(features[valid] @ weight.T / 0.1, 3))
    assert not got[~valid].any()


@pytest.mark.parametrize("num_rows", [0, 3])
def test_without_a_valid_row_the_assignment_is_empty(num_rows: int) -> None:
    features, weight = random(num_rows, 4, dtype=torch.float32), random(20, 4, seed=1, dtype=torch.float32)
    valid = torch.zeros(num_rows, dtype=torch.bool)
    assignment = sinkhorn(features, weight, 0.04, 3, 7, valid=valid)
    assert assignment.column.isfinite().all()
    assert not whole(features, weight, 0.04, assignment).any()
    center = torch.ones(20)
    assert not whole(features, weight, 0.04, centered_softmax(features, weight, center, 0.04, 7, valid)).any()
    update_center(center, features, weight, 0.9, valid=valid)
    assert torch.equal(center, torch.ones(20))


def test_centred_softmax_and_its_centre() -> None:
    features, weight, center = random(6, 4), random(20, 4, seed=1), random(20, seed=2)
    logits = features @ weight.T
    got = whole(features, weight, 0.05, centered_softmax(features, weight, center, 0.05, 7))
    torch.testing.assert_close(got, ((logits - center) / 0.05).softmax(1))
    valid = torch.tensor([True, True, False, True, False, True])
    expected = 0.9 * center + 0.1 * logits[valid].mean(0)
    update_center(center, features, weight, 0.9, valid=valid)
    torch.testing.assert_close(center, expected)


def test_bf16_features_keep_fp32_logits() -> None:
    features, weight = random(16, 32).bfloat16(), random(200, 32, seed=1).bfloat16()
    got = whole(features.double(), weight.double(), 0.5, sinkhorn(features, weight, 0.5, 3, 64))
    torch.testing.assert_close(got, reference(features.double() @ weight.double().T / 0.5, 3), atol=1e-6, rtol=1e-4)


def test_ranks_with_uneven_rows_share_one_assignment(tmp_path: Path) -> None:
    # the second case leaves one rank without any row
    run_on_ranks(_share_assignment, tmp_path, ((5, 3), (6, 0)))


def _share_assignment(rank: int, cases: tuple[tuple[int, int], ...]) -> None:
    for sizes in cases:
        features, weight, start = random(sum(sizes), 4), random(30, 4, seed=1), random(30, seed=2)
        # for every prototype these rows are below the others by more than the range of an exponential
        features[: sizes[0] // 2] *= 60
        mine = features.split(list(sizes))[rank]
        got = whole(mine, weight, 0.06, sinkhorn(mine, weight, 0.06, 3, 8))
        torch.testing.assert_close(got, reference(features @ weight.T / 0.06, 3).split(list(sizes))[rank])
        center = start.clone()
        update_center(center, mine, weight, 0.8)
        torch.testing.assert_close(center, 0.8 * start + 0.2 * (features @ weight.T).mean(0))
