"""Products of 16-bit factors lose nothing beyond what the factors have lost."""

from __future__ import annotations

import torch

from streamtrain.objective.logits import matmul, scaled_logits


def test_products_of_bf16_are_those_of_their_values() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(70, 96, generator=draw).bfloat16()
    weight = torch.randn(640, 96, generator=draw).bfloat16()
    column = torch.randn(640, generator=draw)
    exact = features.double() @ weight.double().T
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precision = products.fp32_precision
    for got, want in (
        (matmul(features, weight.T), exact),
        (scaled_logits(features, weight, 0.1), exact / 0.1),
        (scaled_logits(features, weight, 0.1, column), exact / 0.1 + column.double()),
    ):
        assert got.dtype == torch.float32
        # rounding the result to 16 bits would be an error of 2e-3
        assert float((got.double() - want).abs().max() / want.abs().max()) < 1e-6
    assert products.fp32_precision == precision


def test_a_factor_in_fp32_is_rounded_on_its_way_in() -> None:
    left, right = torch.randn(40, 80), torch.randn(80, 32).bfloat16()
    got = matmul(left, right)
    of_values, of_rounded = left.double() @ right.double(), left.bfloat16().double() @ right.double()
    size = of_values.abs().max()
    # which of the two depends on the processor
    assert min(float((got - each).abs().max() / size) for each in (of_values, of_rounded)) < 1e-6


def test_fp32_factors_keep_their_bits() -> None:
    left, right = torch.randn(40, 80), torch.randn(80, 32)
    exact = left.double() @ right.double()
    assert float((matmul(left, right) - exact).abs().max() / exact.abs().max()) < 1e-6
    assert float((scaled_logits(left, right.T, 1.0) - exact).abs().max() / exact.abs().max()) < 1e-6
