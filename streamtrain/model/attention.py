"""Softmax attention of packed queries, keys and values, in the form that is fastest where it runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from streamtrain.model.rope import RopeTable, rotate

# Tokens of an image up to which a CPU takes whole score matrices where there will be a backward: that of its fused
# attention takes one and a half to four times as long, but the matrices grow with the square.
LONGEST_MATRIX = 1024


def attend(packed: Tensor, table: RopeTable) -> Tensor:
    """Packed ``[images, length, 3, num_heads, head_dim]`` to attention's ``[images, length, num_heads, head_dim]``.

    Of the queries, keys and values, the first two are turned by the table of their positions before.
    """
    short = packed.device.type == "cpu" and packed.shape[1] <= LONGEST_MATRIX
    if short and packed.requires_grad and not torch.compiler.is_compiling():
        return _MatrixAttention.apply(packed, table.cosine, table.sine)
    query, key = rotate(packed[:, :, :2], table).permute(2, 0, 3, 1, 4).unbind(0)
    value = packed[:, :, 2].transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class _MatrixAttention(torch.autograd.Function):
    """Batched matrix products; turns on the way from the packed layout to that of the products, and back."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        images, length, _, num_heads, head_dim = packed.shape
        heads = packed.permute(2, 0, 3, 1, 4)
        laid = torch.empty(heads.shape, dtype=packed.dtype)
        _turn(heads[:2], _planes(cosine), _planes(sine), laid[:2])
        laid[2].copy_(heads[2])
        query, key, value = laid.flatten(1, 2)
        weights = _product(query, key.transpose(1, 2), head_dim**-0.5).softmax(-1)
        output = torch.bmm(weights, value).view(images, num_heads, length, head_dim)
        ctx.save_for_backward(query, key, value, weights, cosine, sine)
        return output.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        query, key, value, weights, cosine, sine = ctx.saved_tensors
        images, length, num_heads, head_dim = grad_outputs[0].shape
        gradient = grad_outputs[0].transpose(1, 2).flatten(0, 1)
        of_weights = torch.bmm(gradient, value.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        laid = torch.empty(3, *query.shape, dtype=query.dtype)
        scale = head_dim**-0.5
        _product(of_scores, key, scale, laid[0])
        _product(of_scores.transpose(1, 2), query, scale, laid[1])
        torch.bmm(weights.transpose(1, 2), gradient, out=laid[2])
        laid = laid.unflatten(1, (images, num_heads))
        packed = torch.empty(images, length, 3, num_heads, head_dim, dtype=query.dtype)
        heads = packed.permute(2, 0, 3, 1, 4)
        half = head_dim // 2
        # the turn back: the sines of either half act on what the other half has become
        _turn(laid[:2], _planes(cosine), _planes(sine).roll(half, -1), heads[:2])
        heads[2].copy_(laid[2])
        return packed, None, None


def _planes(factors: Tensor) -> Tensor:
    """``[length, 1, 1, head_dim]`` to ``[1, 1, length, head_dim]``."""
    return factors.permute(1, 2, 0, 3)


def _turn(heads: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> None:
    """``rotate``, written into ``out`` (which may be laid out otherwise), half by half, without a copy between."""
    half = heads.shape[-1] // 2
    torch.mul(heads, cosine, out=out)
    out[..., :half].addcmul_(heads[..., half:], sine[..., :half])
    out[..., half:].addcmul_(heads[..., :half], sine[..., half:])


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """``scale * left @ right`` of batches, the scale applied within the product."""
    if out is None:
        out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0.0, alpha=scale, out=out)
