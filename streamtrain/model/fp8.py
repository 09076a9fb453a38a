"""FP8 matmuls for the linear layers of the transformer blocks (GPUs of compute capability 8.9 or newer).

Each row of both operands is scaled to the range of the format by its own current maximum, so a few tokens far larger
than the others, which vision transformers have, cost the others no precision. Stored weights stay bf16, and a weight's
gradient, which is summed over all tokens, is a bf16 matmul.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from streamtrain.model.layers import Block

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
# minimum scale, for rows of zeros
TINY = 1e-12


def compute_in_fp8(network: nn.Module) -> None:
    """Let the linear layers of the blocks of ``network`` (bf16, widths multiples of 16) run as FP8 matmuls."""
    for block in network.modules():
        if isinstance(block, Block):
            # the CPU kernels are whole branches, matmuls included
            block.options = replace(block.options, implementation="reference", linear=linear)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``rows @ weight.T + bias`` for bf16 ``[N, in]``, ``[out, in]`` and ``[out]``: bf16 ``[N, out]``."""
    result: Tensor = _Linear.apply(rows, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        result = _matmul(rows, weight)
        return result if bias is None else result + bias

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (gradient,), (rows, weight) = grad_outputs, ctx.saved_tensors
        _, needs_weight, needs_bias = ctx.needs_input_grad
        grad_bias = gradient.sum(0) if needs_bias else None
        return _matmul(gradient, weight.T), gradient.T @ rows if needs_weight else None, grad_bias


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left [N, d] @ right [M, d].T``."""
    (left, left_scale), (right, right_scale) = _scaled(left), _scaled(right)
    return torch._scaled_mm(left, right.T, left_scale, right_scale.T, out_dtype=torch.bfloat16)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows in FP8, contiguous, and the scale of each to multiply the result with, fp32 ``[N, 1]``."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min(TINY) / LARGEST
    return (rows / scale).clamp(-LARGEST, LARGEST).to(FORMAT, memory_format=torch.contiguous_format), scale
