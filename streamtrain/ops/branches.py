"""The residual branches of a transformer block: attention and MLP, each one operation with two implementations.

The PyTorch implementation keeps its activations for the backward or recomputes them, in groups of images. The CPU
kernels (``ops/cpu``) work tile by tile in a core's cache; they keep only the branch's input and recompute the rest in
their backward. Which one runs is decided here, from ``ops.configure``, the device, the dtype and the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from streamtrain.ops.attention import RopeTable, add_key_bias, attend
from streamtrain.ops.cpu import branches as cpu_kernels
from streamtrain.ops.cpu.build import is_enabled
from streamtrain.ops.lora import Adapter


class BranchRows(NamedTuple):
    """The rows of ``[num_tokens, dim]`` that a branch computes; it leaves the others as they are."""

    # int64 [kept tokens], image after image, group after group; None: all
    indices: Tensor | None
    # kept tokens of each group, tokens of one of its images, and the factor of its branch
    sizes: list[int]
    lengths: list[int]
    scales: list[float]
    # fp32 [kept tokens, 1]: another factor for each row; None: 1
    counts: Tensor | None = None


class BranchWeights(NamedTuple):
    """The parameters of a branch: norm, first and last linear layer, LayerScale."""

    norm_weight: Tensor
    norm_bias: Tensor
    first_weight: Tensor
    # None: no bias; for attention the key part may be absent
    first_bias: Tensor | None
    last_weight: Tensor
    last_bias: Tensor
    gamma: Tensor


class BranchAdapters(NamedTuple):
    """The adapters of a branch's linear layers; the CPU kernels have none."""

    first: Adapter | None = None
    last: Adapter | None = None


NO_ADAPTERS = BranchAdapters()


@dataclass(frozen=True)
class BlockOptions:
    """The constants of a block that decide how its branches are computed."""

    dim: int
    hidden: int
    num_heads: int
    eps: float
    is_gated: bool
    # 0: keep the activations of the branch; otherwise recompute them in the backward in this many groups of images
    attention_groups: int = 0
    mlp_groups: int = 0
    # "reference": always PyTorch, for blocks that are compiled or have adapters or another ``linear``
    implementation: Literal["auto", "reference"] = "auto"
    # called with rows, weight and bias
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear


def is_tiled(tokens: Tensor, options: BlockOptions) -> bool:
    """Return whether the CPU kernels compute the branches; these recompute their activations, tile by tile."""
    return (
        options.implementation == "auto"
        and tokens.device.type == "cpu"
        and all(width % 32 == 0 for width in (options.dim, options.hidden, options.dim // options.num_heads))
        and not torch.compiler.is_compiling()
        and is_enabled(tokens.dtype)
    )


def attention_branch(
    tokens: Tensor,
    rows: BranchRows,
    tables: Sequence[RopeTable],
    weights: BranchWeights,
    options: BlockOptions,
    in_place: bool = False,
    adapters: BranchAdapters = NO_ADAPTERS,
) -> Tensor:
    """Add the attention branch to the residual stream at ``rows``.

    Args:
        tokens: the residual stream ``[num_tokens, dim]``.
        tables: RoPE table of each group of images.
        weights: the first layer gives queries, keys and values ``[3 * dim]``.
        in_place: overwrite ``tokens``; only without gradients, and only where ``is_tiled``.
        adapters: only in blocks with ``implementation`` "reference".
    """  # fmt: skip
    if is_tiled(tokens, options):
        assert adapters == NO_ADAPTERS
        return cpu_kernels.attention(tokens, rows, tables, options.num_heads, weights, options.eps, in_place)

    def branch(kept: Tensor, sizes: list[int]) -> Tensor:
        # inside the recomputed branch, so that the bias receives one gradient per group
        bias = add_key_bias(weights.first_bias, len(weights.first_weight))
        normalised = _normalise(kept, weights, options)
        packed = _linear(normalised, weights.first_weight, bias, adapters.first, options)
        attended = attend(packed, sizes, tables, options.num_heads)
        return _linear(attended, weights.last_weight, weights.last_bias, adapters.last, options)

    assert not in_place
    return _add_branch(branch, tokens, rows, weights.gamma, options.attention_groups)


def mlp_branch(
    tokens: Tensor,
    rows: BranchRows,
    weights: BranchWeights,
    options: BlockOptions,
    in_place: bool = False,
    adapters: BranchAdapters = NO_ADAPTERS,
) -> Tensor:
    """Add the MLP branch to the residual stream at ``rows``: GELU, or SwiGLU with gate and up as one matrix.

    The arguments are those of ``attention_branch``.
    """
    if is_tiled(tokens, options):
        assert adapters == NO_ADAPTERS
        return cpu_kernels.mlp(tokens, rows, weights, options.eps, in_place)

    def branch(kept: Tensor, sizes: list[int]) -> Tensor:
        normalised = _normalise(kept, weights, options)
        hidden = _linear(normalised, weights.first_weight, weights.first_bias, adapters.first, options)
        if options.is_gated:
            gate, up = hidden.chunk(2, dim=-1)
            activated = F.silu(gate) * up
        else:
            activated = F.gelu(hidden)
        return _linear(activated, weights.last_weight, weights.last_bias, adapters.last, options)

    assert not in_place
    return _add_branch(branch, tokens, rows, weights.gamma, options.mlp_groups)


def _linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter | None, options: BlockOptions
) -> Tensor:
    output = options.linear(rows, weight, bias)
    return output if adapter is None else adapter.add_to(output, rows)


def _normalise(tokens: Tensor, weights: BranchWeights, options: BlockOptions) -> Tensor:
    return F.layer_norm(tokens, (options.dim,), weights.norm_weight, weights.norm_bias, options.eps)


def _add_branch(
    branch: Callable[[Tensor, list[int]], Tensor], tokens: Tensor, rows: BranchRows, gamma: Tensor, groups: int
) -> Tensor:
    """Return ``tokens`` plus the scaled ``branch`` at ``rows``, as a new tensor."""
    kept = tokens if rows.indices is None else tokens.index_select(0, rows.indices)
    update = _recompute_in_groups(branch, kept, rows, groups) if groups else branch(kept, rows.sizes)
    if rows.counts is not None:
        update = (update * rows.counts).to(update.dtype)
    if rows.indices is None:
        return torch.addcmul(tokens, update, gamma)
    update = update * gamma
    result = tokens.clone()
    pieces = zip(rows.indices.split(rows.sizes), update.split(rows.sizes), rows.scales, strict=True)
    for index, piece, scale in pieces:
        result.index_add_(0, index, piece, alpha=scale)
    return result


def _recompute_in_groups(
    branch: Callable[[Tensor, list[int]], Tensor], tokens: Tensor, rows: BranchRows, groups: int
) -> Tensor:
    """Apply ``branch`` so that its backward recomputes the activations of one group of images at a time."""
    if not torch.is_grad_enabled():
        return branch(tokens, rows.sizes)
    images = [size // length for size, length in zip(rows.sizes, rows.lengths, strict=True)]
    # each group needs images of every size
    count = min(groups, *images)
    pieces: list[Sequence[Tensor]] = [
        part.unflatten(0, (number, -1)).tensor_split(count)
        for part, number in zip(tokens.split(rows.sizes), images, strict=True)
    ]
    outputs: list[list[Tensor]] = [[] for _ in pieces]
    for members in zip(*pieces, strict=True):
        packed = torch.cat([part.flatten(0, 1) for part in members]) if count > 1 else tokens
        sizes = [len(part) * length for part, length in zip(members, rows.lengths, strict=True)]
        # nothing random happens inside a block, so no random state needs saving
        output = checkpoint(branch, packed, sizes, use_reentrant=False, preserve_rng_state=False)
        for of_size, part in zip(outputs, output.split(sizes), strict=True):
            of_size.append(part)
    return torch.cat([part for of_size in outputs for part in of_size])
