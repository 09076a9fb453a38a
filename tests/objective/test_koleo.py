"""KoLeo against its formula in float64, and where the formula has no value."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamtrain.objective.koleo import koleo_loss


def reference(features: Tensor) -> Tensor:
    """``−mean_i log min_{j≠i} ‖x_i − x_j‖`` by an exhaustive search."""
    unit = [row / row.dot(row).sqrt() for row in features]
    nearest = [
        torch.stack([(a - b).square().sum().sqrt() for j, b in enumerate(unit) if j != i]).min()
        for i, a in enumerate(unit)
    ]
    return -torch.stack(nearest).log().mean()


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(2, 9), dim=st.integers(2, 12), seed=st.integers(0, 1000))
def test_value_and_gradient(batch: int, dim: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, dim, dtype=torch.float64, generator=draw).requires_grad_()
    got, expected = koleo_loss(features), reference(features)
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
