"""Autograd functions around the CPU kernels of a block's branches.

A branch is processed in tiles that fit a core's cache. It saves only its input; the backward recomputes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from streamtrain.ops.attention import RopeTable, add_key_bias

if TYPE_CHECKING:
    from streamtrain.ops.branches import BranchRows, BranchWeights


def attention(
    tokens: Tensor, rows: BranchRows, tables: Sequence[RopeTable], num_heads: int, weights: BranchWeights, eps: float,
    in_place: bool,
) -> Tensor:  # fmt: skip
    """Add the attention branch; for the arguments see ``ops.branches.attention_branch``."""
    bias = add_key_bias(weights.first_bias, len(weights.first_weight))
    if bias is None:
        bias = weights.first_weight.new_zeros(len(weights.first_weight))
    weights = weights._replace(first_bias=bias)
    factors = [factor for table in tables for factor in table.factors]
    return _branch("attention", tokens, rows, (factors, num_heads), weights, eps, in_place)


def mlp(tokens: Tensor, rows: BranchRows, weights: BranchWeights, eps: float, in_place: bool) -> Tensor:
    """Add the MLP branch; for the arguments see ``ops.branches.mlp_branch``."""
    return _branch("mlp", tokens, rows, (), weights, eps, in_place)


def _branch(
    kind: str, tokens: Tensor, rows: BranchRows, settings: tuple[Any, ...], weights: BranchWeights, eps: float,
    in_place: bool,
) -> Tensor:  # fmt: skip
    settings = (rows.indices, rows.sizes, rows.scales, rows.counts, *settings)
    if torch.is_grad_enabled():
        assert not in_place
        return _Branch.apply(kind, tokens, settings, eps, *weights)
    out = tokens if in_place else torch.empty_like(tokens)
    _kernel(kind, "forward")(tokens, out, *settings, list(weights), eps)
    return out


def _kernel(kind: str, direction: str) -> Callable[..., Any]:
    return getattr(torch.ops.streamtrain, f"{kind}_{direction}")


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, tokens: Tensor, settings: tuple[Any, ...], eps: float, *weights: Tensor) -> Tensor:
        out = torch.empty_like(tokens)
        _kernel(kind, "forward")(tokens, out, *settings, list(weights), eps)
        # save the parameters themselves, since a sharded engine frees their values until the backward
        ctx.save_for_backward(tokens, *weights)
        ctx.arguments = (kind, settings, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_output,), (tokens, *weights) = grad_outputs, ctx.saved_tensors
        kind, settings, eps = ctx.arguments
        grad_output = grad_output.contiguous()
        grad_tokens = torch.empty_like(grad_output)
        grad_weights = _kernel(kind, "backward")(grad_output, tokens, grad_tokens, *settings, weights, eps)
        return None, grad_tokens, None, None, *grad_weights
