"""FP8 matmuls against bf16 matmuls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from streamtrain.config.model import ModelConfig
from streamtrain.model.compiled import compile_blocks
from streamtrain.model.fp8 import compute_in_fp8, linear
from streamtrain.model.initialise import initialise
from streamtrain.model.vit import VisionTransformer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG = ModelConfig(patch_size=4, dim=64, depth=2, num_heads=2, layerscale=0.5, drop_path=0.4)


def random(*shape: int, seed: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_results_and_gradients_are_close_to_bf16(device: str, with_bias: bool) -> None:
    rows, weight = random(37, 64, seed=0, device=device), random(96, 64, seed=1, device=device)
    bias = random(96, seed=2, device=device)
    for each in (rows, weight, bias):
        each.requires_grad_()
    given = random(37, 96, seed=3, device=device)
    inputs = (rows, weight, bias) if with_bias else (rows, weight)
    results = []
    for function in (linear, F.linear):
        output = function(rows, weight, bias if with_bias else None)
        results.append([output, *torch.autograd.grad(output, inputs, given)])
    (output, grad_rows, *exact), (expected, expected_grad_rows, *expected_exact) = results
    # three bits of mantissa: each operand has an error of up to a sixteenth, 2 to 3 % on average
    assert 0.005 < relative(output, expected) < 0.05 and 0.005 < relative(grad_rows, expected_grad_rows) < 0.05
    for found, exact_value in zip(exact, expected_exact, strict=True):
        torch.testing.assert_close(found, exact_value)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_far_larger_than_the_others_costs_them_no_precision(device: str) -> None:
    rows, weight = random(32, 64, seed=0, device=device), random(48, 64, seed=1, device=device)
    alone = linear(rows[1:], weight, None)
    rows[0] *= 1e6
    weight[0] *= 1e-6
    assert torch.equal(linear(rows, weight, None)[1:, 1:], alone[:, 1:])
    assert relative(linear(rows, weight, None)[1:, 0], rows[1:] @ weight[0]) < 0.05


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_propagate(device: str, bad: float) -> None:
    rows, weight = random(32, 64, seed=0, device=device), random(48, 64, seed=1, device=device)
    rows[3, 5] = bad
    found = linear(rows, weight, None).isfinite()
    assert not found[3].any() and found[:3].all() and found[4:].all()


@pytest.mark.parametrize("device", DEVICES)
def test_zeros_stay_zeros(device: str) -> None:
    weight = random(48, 64, seed=1, device=device)
    assert not linear(torch.zeros(32, 64, dtype=torch.bfloat16, device=device), weight, None).any()


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_network_have_the_direction_of_bf16_gradients(
    device: str, mlp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"mlp": mlp})
    networks = [VisionTransformer(config, "block").to(device) for _ in range(3)]
    for network in networks:
        initialise(network, config, 0)
        network.to(torch.bfloat16)
        for block in network.blocks:
            block.options = replace(block.options, implementation="reference")
    _, eager, compiled = networks
    compute_in_fp8(eager)
    compute_in_fp8(compiled)
    monkeypatch.setattr(torch, "compile", lambda *args, _compile=torch.compile, **named: _compile(
        *args, **named, backend="aot_eager" if device == "cpu" else "inductor"
    ))  # fmt: skip
    compile_blocks(compiled)
    for network in networks:
        crops = [random(4, 3, 16, 16, seed=1, device=device), random(6, 3, 8, 8, seed=2, device=device)]
        tokens, _ = network.encode(crops, [None, None], torch.Generator(device).manual_seed(0))
        (tokens.float() * random(*tokens.shape, seed=3, device=device)).sum().backward()
    for (name, expected), *others in zip(*(network.named_parameters() for network in networks), strict=True):
        if expected.grad is None or not expected.grad.any():
            continue
        for _, found in others:
            cosine = F.cosine_similarity(found.grad.float().flatten(), expected.grad.float().flatten(), dim=0)
            assert cosine > 0.99, (name, cosine)
            if "blocks" in name and "weight" in name and "norm" not in name:
                assert not torch.equal(found.grad, expected.grad), name
