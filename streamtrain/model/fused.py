"""The branches of a block as one operation each, on a CPU (``streamtrain/ops/cpu``).

A branch passes through in tiles that fit a core's cache, and its backward makes again what it needs. It keeps its
input only, so that nothing needs to be recomputed around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from streamtrain.model.drop_path import DropPath, Wanted
from streamtrain.model.layout import Layout
from streamtrain.model.rope import RopeTable
from streamtrain.ops.cpu.build import usable


class Place(NamedTuple):
    """Which rows of ``[num_tokens, dim]`` a branch computes."""

    # int64 [kept tokens], image after image, group after group; None: all
    rows: Tensor | None
    # of each group: its kept tokens, and what they count
    sizes: list[int]
    scales: list[float]
    # fp32, one a kept token: a factor of that; None: 1
    counts: Tensor | None = None


def place(layout: Layout, drop: DropPath | None, branch: int) -> Place:
    """The rows of ``branch`` 0 or 1."""
    if drop is None:
        return Place(None, layout.sizes(), [1.0] * len(layout.groups))
    return Place(drop.rows[branch], drop.layout.sizes(), list(drop.scales))


def place_of(wanted: Wanted) -> Place:
    """All rows that are wanted, taken out of the others; those that drop-path leaves out, few, count 0."""
    return Place(None, [len(wanted.rows)], [1.0], wanted.counts)


def suits(tokens: Tensor, dim: int, hidden: int, num_heads: int) -> bool:
    """Whether the branches of a block of this size, on these tokens, can be computed so."""
    return (
        tokens.device.type == "cpu"
        and all(width % 32 == 0 for width in (dim, hidden, dim // num_heads))
        and not torch.compiler.is_compiling()
        and usable(tokens.dtype)
    )


def attention(
    tokens: Tensor, where: Place, tables: Sequence[RopeTable], num_heads: int, weights: Sequence[Tensor], eps: float,
    in_place: bool,
) -> Tensor:
    """``tokens [num_tokens, dim]`` plus the attention branch at its rows.

    Args:
        tokens: the residual stream.
        where: the branch's rows.
        tables: of each group.
        num_heads: of the attention.
        weights: the norm's weight and bias, those of ``qkv`` (a whole bias), those of ``proj``, LayerScale's factors.
        eps: the norm's.
        in_place: only without gradients: overwrite ``tokens``.
    """  # fmt: skip
    factors = [factor[:, 0, 0] for table in tables for factor in (table.cosine, table.sine)]
    return _branch("attention", tokens, where, (factors, num_heads), weights, eps, in_place)


def mlp(tokens: Tensor, where: Place, weights: Sequence[Tensor], eps: float, in_place: bool) -> Tensor:
    """``tokens [num_tokens, dim]`` plus the MLP branch at its rows, with GELU, or with SwiGLU's two matrices as one.

    ``weights``: the norm's weight and bias, those of the first and of the second layer, LayerScale's factors.
    """
    return _branch("mlp", tokens, where, (), weights, eps, in_place)


def _branch(
    kind: str, tokens: Tensor, where: Place, settings: tuple[Any, ...], weights: Sequence[Tensor], eps: float,
    in_place: bool,
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        assert not in_place
        return _Branch.apply(kind, tokens, where, settings, eps, *weights)
    out = tokens if in_place else torch.empty_like(tokens)
    _kernel(kind, "forward")(tokens, out, *where, *settings, list(weights), eps)
    return out


def _kernel(kind: str, direction: str) -> Callable[..., Any]:
    return getattr(torch.ops.streamtrain, f"{kind}_{direction}")


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: str, tokens: Tensor, where: Place, settings: tuple[Any, ...], eps: float, *weights: Tensor
    ) -> Tensor:
        out = torch.empty_like(tokens)
        _kernel(kind, "forward")(tokens, out, *where, *settings, list(weights), eps)
        # parameters themselves, since a sharded engine frees their values until the backward
        ctx.save_for_backward(tokens, *weights)
        ctx.rest = (kind, where, settings, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (by_out,), (tokens, *weights) = grad_outputs, ctx.saved_tensors
        kind, where, settings, eps = ctx.rest
        by_out = by_out.contiguous()
        by_tokens = torch.empty_like(by_out)
        by_weights = _kernel(kind, "backward")(by_out, tokens, by_tokens, *where, *settings, weights, eps)
        return None, by_tokens, None, None, None, *by_weights
