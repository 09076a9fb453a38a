"""Softmax attention of packed queries, keys and values, in the form that is fastest where it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from streamtrain.model.layout import Layout
from streamtrain.model.rope import RopeTable, rotate

# Tokens of an image up to which a CPU takes whole score matrices where there will be a backward: that of its fused
# attention takes one and a half to four times as long, but the matrices grow with the square.
LONGEST_MATRIX = 1024
# Tokens that pass at a time there: so many that what is made of them stays in a core's cache.
TOKENS_AT_ONCE = 1024


def attend(packed: Tensor, layout: Layout, tables: Sequence[RopeTable], num_heads: int) -> Tensor:
    """Attention within each image: packed ``[num_tokens, 3 * dim]`` (queries, keys, values) to ``[num_tokens, dim]``.

    Queries and keys are turned by the table of their positions before.
    """
    short = packed.device.type == "cpu" and max(map(layout.length, range(len(tables)))) <= LONGEST_MATRIX
    if short and packed.requires_grad and not torch.compiler.is_compiling():
        factors = [factor[:, 0, 0] for table in tables for factor in (table.cosine, table.sine)]
        return _MatrixAttention.apply(packed, layout, num_heads, *factors)
    outputs = []
    for view, table in zip(layout.views(packed), tables, strict=True):
        heads = view.unflatten(-1, (3, num_heads, -1))
        query, key = rotate(heads[:, :, :2], table).permute(2, 0, 3, 1, 4).unbind(0)
        output = F.scaled_dot_product_attention(query, key, heads[:, :, 2].transpose(1, 2))
        outputs.append(output.transpose(1, 2).flatten(2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _MatrixAttention(torch.autograd.Function):
    """Batched matrix products, a few images at a time; scores and softmax in fp32, as the fused form has them."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, layout: Layout, num_heads: int, *factors: Tensor) -> Tensor:
        output = packed.new_empty(packed.shape[0], packed.shape[1] // 3)
        kept = []
        for heads, place, cosine, sine in _by_size(packed, output, layout, num_heads, factors):
            _, images, _, length, head_dim = heads.shape
            laid = packed.new_empty(heads.shape)
            weights = packed.new_empty(images, num_heads, length, length)
            for part in _parts(images, length):
                turned = laid[:, part].copy_(heads[:, part])
                _turn(turned[:2], cosine, sine)
                query, key, value = turned.flatten(1, 2)
                scores = _product(_accurate(query), _accurate(key).transpose(1, 2), head_dim**-0.5)
                weight = weights[part].copy_(scores.view_as(weights[part]).softmax(-1)).flatten(0, 1)
                place[0, part] = torch.bmm(weight, value).unflatten(0, (-1, num_heads))
            kept += [laid, weights]
        ctx.save_for_backward(*factors, *kept)
        ctx.layout, ctx.num_heads = layout, num_heads
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        layout, num_heads, (gradient,) = ctx.layout, ctx.num_heads, grad_outputs
        saved, num_factors = ctx.saved_tensors, 2 * len(layout.groups)
        factors, kept = saved[:num_factors], iter(saved[num_factors:])
        packed = gradient.new_empty(gradient.shape[0], 3 * gradient.shape[1])
        for heads, given, cosine, sine in _by_size(packed, gradient, layout, num_heads, factors):
            _, images, _, length, head_dim = heads.shape
            laid, weights, scale = next(kept), next(kept), head_dim**-0.5
            # the turn back: the sines of either half act on what the other half has become
            back = sine.roll(head_dim // 2, -1)
            for part in _parts(images, length):
                query, key, value = laid[:, part].flatten(1, 2)
                weight, of_output = weights[part].flatten(0, 1), given[0, part].flatten(0, 1)
                of_weights = torch.bmm(of_output, value.transpose(1, 2))
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, weight, -1, weight.dtype)
                of_laid = query.new_empty(3, *query.shape)
                _product(of_scores, key, scale, of_laid[0])
                _product(of_scores.transpose(1, 2), query, scale, of_laid[1])
                torch.bmm(weight.transpose(1, 2), of_output, out=of_laid[2])
                _turn(of_laid[:2], cosine, back)
                heads[:, part] = of_laid.unflatten(1, (-1, num_heads))
        return packed, None, None, *([None] * len(factors))


def _by_size(
    packed: Tensor, merged: Tensor, layout: Layout, num_heads: int, factors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each crop size: views ``[3, images, num_heads, length, head_dim]`` of ``packed [num_tokens, 3 * dim]`` and
    ``[1, ...]`` of ``merged [num_tokens, dim]``, then the cosines and sines ``[length, head_dim]``."""
    for tripled, single, cosine, sine in zip(
        layout.views(packed), layout.views(merged), factors[::2], factors[1::2], strict=True
    ):
        heads, place = (
            view.unflatten(-1, (kinds, num_heads, -1)).permute(2, 0, 3, 1, 4)
            for view, kinds in ((tripled, 3), (single, 1))
        )
        yield heads, place, cosine, sine


def _parts(images: int, length: int) -> Iterator[slice]:
    size = max(1, TOKENS_AT_ONCE // length)
    for start in range(0, images, size):
        yield slice(start, start + size)


def _accurate(heads: Tensor) -> Tensor:
    """Scores of 30 in 16 bits would be off by a sixteenth, and so the weights by as much."""
    return heads.float() if heads.dtype.itemsize < 4 else heads


def _turn(heads: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """``rotate`` of ``[..., length, head_dim]`` in place, by factors ``[length, head_dim]``."""
    other = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cosine).addcmul_(other, sine)


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """``scale * left @ right`` of batches, the scale applied within the product."""
    if out is None:
        out = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0.0, alpha=scale, out=out)
