"""The transformer block on packed tokens, and its parts.

No module here draws its own initial values: storage stays as it is until ``initialise.py`` (or a checkpoint)
fills it, which costs nothing on a sharded or meta device and is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamtrain.config.model import ModelConfig
from streamtrain.model import fused
from streamtrain.model.attention import attend
from streamtrain.model.drop_path import DropPath, Wanted
from streamtrain.model.layout import Group, Layout
from streamtrain.model.rope import RopeTable


class Linear(nn.Linear):
    """A linear layer that leaves its storage untouched when built."""

    # of input, weight and bias; another one may take its place
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """A layer norm that leaves its storage untouched when built."""

    def reset_parameters(self) -> None:
        pass


class QueryKeyValue(Linear):
    """One matrix for queries, keys and values; the key part of the bias is absent unless asked for.

    Without positions a key bias would shift all scores of a query alike, which softmax ignores. RoPE turns it by each
    key's position, so here it does move the scores: a model with one cannot be turned into a model without.
    """

    def __init__(self, dim: int, bias: bool, key_bias: bool) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        if bias:
            self.bias = nn.Parameter(torch.empty(3 * dim if key_bias else 2 * dim))

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.whole_bias())

    def whole_bias(self) -> Tensor | None:
        """``[3 * dim]``, zeros for a key part that is absent."""
        bias: Tensor | None = self.bias
        if bias is not None and bias.shape[0] < self.out_features:
            query, value = bias.chunk(2)
            bias = torch.cat([query, torch.zeros_like(query), value])
        return bias


class Attention(nn.Module):
    """Multi-head self-attention within each image of the packed tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = QueryKeyValue(config.dim, config.qkv_bias, config.key_bias)
        self.proj = Linear(config.dim, config.dim)

    def forward(self, tokens: Tensor, layout: Layout, tables: list[RopeTable]) -> Tensor:
        """``[num_tokens, dim]`` to the same; projections run once, attention once a crop size."""
        return self.proj(attend(self.qkv(tokens), layout, tables, self.num_heads))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.dim, config.hidden)
        self.down = Linear(config.hidden, config.dim)

    @property
    def first(self) -> Linear:
        """The layer before the activation."""
        return self.up

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(tokens)))


class SwiGlu(nn.Module):
    """``down(silu(gate(x)) * up(x))``, gate and up as one matrix (gate first)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.hidden)
        self.down = Linear(config.hidden, config.dim)

    @property
    def first(self) -> Linear:
        """The layer before the activation."""
        return self.gate_up

    def forward(self, tokens: Tensor) -> Tensor:
        gate, up = self.gate_up(tokens).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LayerScale(nn.Module):
    """Adds a branch to the residual stream, scaled by one learnt factor a feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor, branch: Tensor, drop: DropPath | None, which: int) -> Tensor:
        """``tokens [num_tokens, dim]`` plus ``branch``, which has the kept rows only where ``drop`` is given."""
        if drop is None:
            return torch.addcmul(tokens, branch, self.gamma)
        return drop.add(tokens, branch * self.gamma, which)


class Block(nn.Module):
    """Pre-norm attention and MLP on packed tokens: the unit that is gathered, checkpointed and compiled."""

    def __init__(self, config: ModelConfig, recompute_mlp: bool = False, groups: int = 1) -> None:
        """What the backward recomputes *within* the block, beside what whoever calls it recomputes.

        Args:
            recompute_mlp: the activations of the MLP branch.
            groups: above 1, those of either branch that is recomputed, in so many groups of images, so that no
                more than one group's are alive.
        """
        super().__init__()
        self.recompute_mlp = recompute_mlp
        self.groups = groups
        # False where the branches' parts are replaced, which those for CPUs do not know of
        self.kernels = True
        self.norm1 = LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.scale1 = LayerScale(config.dim)
        self.norm2 = LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp: Mlp | SwiGlu = SwiGlu(config) if config.mlp == "swiglu" else Mlp(config)
        self.scale2 = LayerScale(config.dim)

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        tables: list[RopeTable],
        drop: DropPath | None = None,
        chunk: int = 0,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """``[num_tokens, dim]`` to the same; with ``wanted`` to those rows only, whose MLP branch alone is computed.

        With ``chunk`` > 0 (only without gradients) that many images pass at a time and the result
        **overwrites** ``tokens``, so that no more than one chunk's activations are alive.
        """
        assert not chunk or (not torch.is_grad_enabled() and drop is None)
        if self.fused(tokens):
            return self._fused(tokens, layout, tables, drop, bool(chunk), wanted)
        if not chunk:
            return self.transform(tokens, layout, tables, drop, wanted)
        through = self.transform if wanted is None else self.attend
        for view, group, table in zip(layout.views(tokens), layout.groups, tables, strict=True):
            for piece in view.split(chunk):
                part = Layout((Group(piece.shape[0], group.grid),), layout.num_prefix)
                flat = piece.flatten(0, 1)
                flat.copy_(through(flat, part, [table], None))
        if wanted is None:
            return tokens
        pieces = tokens.index_select(0, wanted.rows).split(chunk * layout.length(0))
        return torch.cat([self.refine(piece, layout, tables, None, None) for piece in pieces])

    def transform(
        self,
        tokens: Tensor,
        layout: Layout,
        tables: list[RopeTable],
        drop: DropPath | None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """Both branches, with ``drop`` of its kept images only each; for ``wanted`` see ``forward``."""
        # not by the instance, whose two parts may be compiled on their own
        tokens = Block.attend(self, tokens, layout, tables, drop)
        return Block.refine(self, tokens, layout, tables, drop, wanted)

    def attend(self, tokens: Tensor, layout: Layout, tables: list[RopeTable], drop: DropPath | None) -> Tensor:
        """The attention branch."""
        inner = layout if drop is None else drop.layout
        kept = tokens if drop is None else drop.select(tokens, 0)
        attended = self._grouped(self._attend, kept, inner, tables, self.groups > 1 and not self.recompute_mlp)
        return self.scale1(tokens, attended, drop, 0)

    def refine(
        self,
        tokens: Tensor,
        layout: Layout,
        tables: list[RopeTable],
        drop: DropPath | None,
        wanted: Wanted | None,
    ) -> Tensor:
        """The MLP branch."""
        recompute = self.groups > 1 or self.recompute_mlp
        if wanted is not None:
            kept = tokens.index_select(0, wanted.rows)
            # to the groups, images of one token
            inner = Layout((Group(len(kept), (1, 1)),), 0)
            refined = self._grouped(self._refine, kept, inner, tables, recompute)
            if wanted.counts is not None:
                refined = (refined * wanted.counts).to(refined.dtype)
            return self.scale2(kept, refined, None, 1)
        inner = layout if drop is None else drop.layout
        kept = tokens if drop is None else drop.select(tokens, 1)
        refined = self._grouped(self._refine, kept, inner, tables, recompute)
        return self.scale2(tokens, refined, drop, 1)

    def fused(self, tokens: Tensor) -> bool:
        """Whether the branches are one operation each, which recompute within themselves."""
        return self.kernels and fused.suits(
            tokens, self.norm1.normalized_shape[0], self.mlp.down.in_features, self.attention.num_heads
        )

    def _fused(
        self,
        tokens: Tensor,
        layout: Layout,
        tables: list[RopeTable],
        drop: DropPath | None,
        in_place: bool,
        wanted: Wanted | None,
    ) -> Tensor:
        norm, qkv, proj = self.norm1, self.attention.qkv, self.attention.proj
        bias = qkv.whole_bias()
        if bias is None:
            bias = qkv.weight.new_zeros(qkv.out_features)
        weights = (norm.weight, norm.bias, qkv.weight, bias, proj.weight, proj.bias, self.scale1.gamma)
        where, heads = fused.place(layout, drop, 0), self.attention.num_heads
        tokens = fused.attention(tokens, where, tables, heads, weights, norm.eps, in_place)
        norm, first, down = self.norm2, self.mlp.first, self.mlp.down
        weights = (norm.weight, norm.bias, first.weight, first.bias, down.weight, down.bias, self.scale2.gamma)
        if wanted is None:
            return fused.mlp(tokens, fused.place(layout, drop, 1), weights, norm.eps, in_place)
        return fused.mlp(tokens.index_select(0, wanted.rows), fused.place_of(wanted), weights, norm.eps, in_place)

    def _attend(self, tokens: Tensor, layout: Layout, tables: list[RopeTable]) -> Tensor:
        return self.attention(self.norm1(tokens), layout, tables)

    def _refine(self, tokens: Tensor, layout: Layout, tables: list[RopeTable]) -> Tensor:
        return self.mlp(self.norm2(tokens))

    def _grouped(
        self, branch: Callable[..., Tensor], tokens: Tensor, layout: Layout, tables: list[RopeTable], recompute: bool
    ) -> Tensor:
        if not recompute or not torch.is_grad_enabled():
            return branch(tokens, layout, tables)
        # no group may be without images of one size
        count = min(self.groups, *(group.images for group in layout.groups))
        pieces: list[Sequence[Tensor]] = [view.tensor_split(count) for view in layout.views(tokens)]
        outputs: list[list[Tensor]] = [[] for _ in pieces]
        for members in zip(*pieces, strict=True):
            groups = [Group(len(part), group.grid) for part, group in zip(members, layout.groups, strict=True)]
            packed = torch.cat([part.flatten(0, 1) for part in members]) if count > 1 else tokens
            part_layout = Layout(tuple(groups), layout.num_prefix)
            output = checkpoint(branch, packed, part_layout, tables, use_reentrant=False, preserve_rng_state=False)
            for of_size, part in zip(outputs, output.split(part_layout.sizes()), strict=True):
                of_size.append(part)
        return torch.cat([part for of_size in outputs for part in of_size])
