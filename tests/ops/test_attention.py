"""Both forms of CPU attention compute the same function and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamtrain.ops import attention
from streamtrain.ops.attention import RopeTable


def random_table(length: int, head_dim: int, draw: torch.Generator) -> RopeTable:
    angles = torch.randn(length, 1, 1, head_dim // 2, generator=draw, dtype=torch.float64)
    return RopeTable(torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1))


def with_gradient(
    monkeypatch: pytest.MonkeyPatch, longest: int, packed: Tensor, sizes: list[int], tables: list[RopeTable], heads: int
) -> list[Tensor]:
    monkeypatch.setattr(attention, "MAX_MATRIX_LENGTH", longest)
    tables = [RopeTable(table.cosine.to(packed.dtype), table.sine.to(packed.dtype)) for table in tables]
    # not a leaf, like the output of a linear layer
    leaf = packed.clone().requires_grad_()
    output = attention.attend(leaf * 1.0, sizes, tables, heads)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(weight.to(output.dtype))
    assert leaf.grad is not None
    return [output.detach().double(), leaf.grad.double()]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("images", [(1,), (3, 5)])
def test_score_matrices_equal_fused_attention(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, images: tuple[int, ...]
) -> None:
    # the images do not divide into parts, and some images are longer than a part
    monkeypatch.setattr(attention, "TOKENS_PER_PART", 14)
    draw = torch.Generator().manual_seed(0)
    lengths = [1 + 4 * (5 - 3 * index) for index in range(len(images))]
    sizes = [count * length for count, length in zip(images, lengths, strict=True)]
    tables = [random_table(length, 8, draw) for length in lengths]
    packed = torch.randn(sum(sizes), 48, generator=draw, dtype=torch.float64).to(dtype)
    fused = with_gradient(monkeypatch, 0, packed.double(), sizes, tables, 2)
    ours = with_gradient(monkeypatch, 1024, packed, sizes, tables, 2)
    for got, want in zip(ours, fused, strict=True):
        assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


def test_large_scores_are_as_accurate_as_in_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, draw = [2 * 105], torch.Generator().manual_seed(0)
    packed = torch.randn(sizes[0], 3, 3, 64, generator=draw, dtype=torch.float64)
    # scores with a standard deviation of 8, the largest beyond 30
    packed[:, :2] *= 8**0.5
    packed = packed.flatten(1).bfloat16()
    tables = [random_table(105, 64, draw)]
    # round the sines and cosines equally for all
    tables = [RopeTable(*(factor.bfloat16() for factor in (tables[0].cosine, tables[0].sine)))]
    exact = with_gradient(monkeypatch, 0, packed.double(), sizes, tables, 3)
    fused, ours = (with_gradient(monkeypatch, longest, packed, sizes, tables, 3) for longest in (0, 1024))
    for got, reference, want in zip(ours, fused, exact, strict=True):
        assert float((got - want).norm()) <= 1.1 * float((reference - want).norm())


def test_longer_images_and_passes_without_gradients_use_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_MATRIX_LENGTH", 4)
    name = "_MatrixAttentionBackward"
    for length, fused in ((4, False), (5, True)):
        table = RopeTable(torch.ones(length, 1, 1, 4), torch.zeros(length, 1, 1, 4))
        packed = torch.randn(2 * length, 12, requires_grad=True)
        assert (name in str(attention.attend(packed, [2 * length], [table], 1).grad_fn)) is not fused
        assert not attention.attend(packed.detach(), [2 * length], [table], 1).requires_grad
