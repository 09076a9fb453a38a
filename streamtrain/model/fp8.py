"""The products of the blocks' linear layers in 8-bit floating point, for processors that multiply such numbers.

Each row of either factor is scaled to the range of the format, by its own largest value at the time: a few tokens far
larger than the others, as vision transformers have them, cost the others nothing. Weights stay what they are between
the products, and a weight's gradient, which is summed over all tokens, is a product in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamtrain.model.layers import Block, Linear

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
# a row of zeros has no scale
TINY = 1e-12


def compute_in_fp8(network: nn.Module) -> None:
    """From now on the blocks of ``network``, whose widths are multiples of 16, form their products of bf16 so."""
    for block in network.modules():
        if isinstance(block, Block):
            # those for CPUs are whole branches, products included
            block.kernels = False
            for layer in block.modules():
                if isinstance(layer, Linear):
                    layer.product = linear


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight.T + bias`` of bf16 ``[N, in]``, ``[out, in]`` and ``[out]``: bf16 ``[N, out]``."""
    result: Tensor = _Linear.apply(rows, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.with_bias = bias is not None
        product = _product(rows, weight)
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,), (rows, weight) = grad_outputs, ctx.saved_tensors
        of_bias = gradient.sum(0) if ctx.with_bias else None
        return _product(gradient, weight.T), gradient.T @ rows, of_bias


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left [N, d] @ right [M, d].T``."""
    (left, left_scale), (right, right_scale) = _scaled(left), _scaled(right)
    return torch._scaled_mm(left, right.T, left_scale, right_scale.T, out_dtype=torch.bfloat16)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in the format, contiguous, and what each is to be multiplied with, fp32 ``[N, 1]``."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min(TINY) / LARGEST
    return (rows / scale).clamp(-LARGEST, LARGEST).to(FORMAT, memory_format=torch.contiguous_format), scale
