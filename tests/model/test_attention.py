"""Both forms of attention are the same function, with the same gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamtrain.model import attention
from streamtrain.model.rope import RopeTable


def with_gradient(monkeypatch: pytest.MonkeyPatch, longest: int, packed: Tensor, table: RopeTable) -> list[Tensor]:
    monkeypatch.setattr(attention, "LONGEST_MATRIX", longest)
    # not a leaf, as behind a linear layer
    leaf = packed.clone().requires_grad_()
    output = attention.attend(leaf * 1.0, table)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(weight.to(output.dtype))
    assert leaf.grad is not None
    return [output.detach().double(), leaf.grad.double()]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize(("images", "length"), [(1, 1), (3, 21)])
def test_matrices_equal_fused_attention(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, images: int, length: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    packed = torch.randn(images, length, 3, 2, 8, generator=draw, dtype=torch.float64).to(dtype)
    angles = torch.randn(length, 1, 1, 4, generator=draw, dtype=torch.float64)
    cosine, sine = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    fused = with_gradient(monkeypatch, 0, packed.double(), RopeTable(cosine, sine))
    ours = with_gradient(monkeypatch, length, packed, RopeTable(cosine.to(dtype), sine.to(dtype)))
    for got, want in zip(ours, fused, strict=True):
        assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


def test_longer_images_and_passes_without_gradient_take_the_fused_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST_MATRIX", 4)
    table = RopeTable(torch.ones(5, 1, 1, 4), torch.zeros(5, 1, 1, 4))
    name = "_MatrixAttentionBackward"
    packed = torch.randn(2, 5, 3, 1, 4, requires_grad=True)
    short = RopeTable(table.cosine[:4], table.sine[:4])
    # a transposed view of what the form returned
    assert name in str(attention.attend(packed[:, :4], short).grad_fn)
    assert name not in str(attention.attend(packed, table).grad_fn)
    assert not attention.attend(packed.detach()[:, :4], short).requires_grad
