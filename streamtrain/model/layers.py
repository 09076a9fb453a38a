"""The transformer block on packed tokens, and its parameters.

No module draws its own initial values: the storage stays uninitialised until ``initialise.py`` or a checkpoint fills
it, which costs nothing on a sharded or meta device and is the same for any number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from streamtrain.config.model import LoraConfig, ModelConfig, Target
from streamtrain.model.layout import DropPath, Group, Layout, OutputRows
from streamtrain.ops.attention import RopeTable
from streamtrain.ops.branches import BlockOptions, BranchAdapters, BranchWeights, attention_branch, is_tiled, mlp_branch
from streamtrain.ops.lora import Adapter


class Linear(nn.Linear):
    """A linear layer without initial values.

    Its forward ignores the adapter, which only the branches of a block apply.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, lora: LoraConfig | None = None) -> None:
        super().__init__(inputs, outputs, bias)
        self.lora = lora
        if lora is not None:
            self.lora_a = nn.Parameter(torch.empty(lora.rank, inputs))
            self.lora_b = nn.Parameter(torch.empty(outputs, lora.rank))

    def reset_parameters(self) -> None:
        pass

    @property
    def adapter(self) -> Adapter | None:
        return None if self.lora is None else Adapter(self.lora_a, self.lora_b, self.lora.scale)


class LayerNorm(nn.LayerNorm):
    """A layer norm without initial values."""

    def reset_parameters(self) -> None:
        pass


class QueryKeyValue(Linear):
    """One matrix for queries, keys and values; the key part of the bias is absent unless requested.

    Without positions a key bias would shift all scores of a query equally, which softmax ignores. RoPE rotates it by
    each key's position, so here it does change the scores: a model with one cannot be converted into one without.
    """

    def __init__(self, dim: int, bias: bool, key_bias: bool, lora: LoraConfig | None = None) -> None:
        super().__init__(dim, 3 * dim, bias=False, lora=lora)
        if bias:
            self.bias = nn.Parameter(torch.empty(3 * dim if key_bias else 2 * dim))


def _of_target(lora: LoraConfig | None, target: Target) -> LoraConfig | None:
    """Return ``lora`` if it adapts ``target``."""
    return lora if lora is not None and target in lora.targets else None


class Attention(nn.Module):
    """Parameters of multi-head self-attention."""

    def __init__(self, config: ModelConfig, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.qkv = QueryKeyValue(config.dim, config.qkv_bias, config.key_bias, _of_target(lora, "qkv"))
        self.proj = Linear(config.dim, config.dim, lora=_of_target(lora, "proj"))


class Mlp(nn.Module):
    """Parameters of ``down(gelu(up(x)))``."""

    def __init__(self, config: ModelConfig, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.up = Linear(config.dim, config.hidden, lora=_of_target(lora, "mlp"))
        self.down = Linear(config.hidden, config.dim, lora=_of_target(lora, "mlp"))

    @property
    def first(self) -> Linear:
        """The layer before the activation."""
        return self.up


class SwiGlu(nn.Module):
    """Parameters of ``down(silu(gate(x)) * up(x))``, gate and up as one matrix (gate first)."""

    def __init__(self, config: ModelConfig, lora: LoraConfig | None = None) -> None:
        super().__init__()
        self.gate_up = Linear(config.dim, 2 * config.hidden, lora=_of_target(lora, "mlp"))
        self.down = Linear(config.hidden, config.dim, lora=_of_target(lora, "mlp"))

    @property
    def first(self) -> Linear:
        return self.gate_up


class LayerScale(nn.Module):
    """Learnt factors of a branch, one per feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))


class Block(nn.Module):
    """Pre-norm attention and MLP on packed tokens: the unit that is gathered, checkpointed and compiled."""

    def __init__(
        self, config: ModelConfig, recompute_mlp: bool = False, groups: int = 1, lora: LoraConfig | None = None
    ) -> None:
        """Build a block with activation checkpointing inside it, in addition to the caller's.

        Args:
            recompute_mlp: recompute the activations of the MLP branch in the backward.
            groups: above 1, recompute in this many groups of images, so that only one group's activations are
                alive; without ``recompute_mlp`` this applies to both branches.
            lora: adapters of the block's linear layers; None: no adapters.
        """
        super().__init__()
        self.options = BlockOptions(
            config.dim, config.hidden, config.num_heads, config.norm_eps, config.mlp == "swiglu",
            attention_groups=groups if groups > 1 and not recompute_mlp else 0,
            mlp_groups=groups if groups > 1 or recompute_mlp else 0,
            # in all blocks, so that a network with adapters has one implementation
            implementation="reference" if config.lora.rank else "auto",
        )  # fmt: skip
        self.norm1 = LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, lora)
        self.scale1 = LayerScale(config.dim)
        self.norm2 = LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp: Mlp | SwiGlu = (SwiGlu if config.mlp == "swiglu" else Mlp)(config, lora)
        self.scale2 = LayerScale(config.dim)

    def is_tiled(self, tokens: Tensor) -> bool:
        """Return whether the CPU kernels compute the branches, and so recompute their activations."""
        return is_tiled(tokens, self.options)

    def forward(
        self, tokens: Tensor, layout: Layout, tables: list[RopeTable], drop: DropPath | None = None, chunk: int = 0,
        output: OutputRows | None = None,
    ) -> Tensor:  # fmt: skip
        """Map ``[num_tokens, dim]`` to the same shape; with ``output`` compute the MLP branch and result of its rows.

        With ``chunk`` > 0 (only without gradients) process that many images at a time and **overwrite** ``tokens``,
        so that only one chunk's activations are alive.
        """
        assert not chunk or (not torch.is_grad_enabled() and drop is None)
        if not chunk or self.is_tiled(tokens):
            return self.transform(tokens, layout, tables, drop, output, bool(chunk))
        compute = self.transform if output is None else self.attend
        for view, group, table in zip(layout.views(tokens), layout.groups, tables, strict=True):
            for piece in view.split(chunk):
                part = Layout((Group(piece.shape[0], group.grid),), layout.num_prefix)
                flat = piece.flatten(0, 1)
                flat.copy_(compute(flat, part, [table], None))
        if output is None:
            return tokens
        pieces = tokens.index_select(0, output.rows).split(chunk * layout.length(0))
        return torch.cat([self.refine(piece, Layout((Group(len(piece), (1, 1)),), 0), None, None) for piece in pieces])

    def transform(
        self, tokens: Tensor, layout: Layout, tables: list[RopeTable], drop: DropPath | None,
        output: OutputRows | None = None, in_place: bool = False,
    ) -> Tensor:  # fmt: skip
        """Apply both branches; for the arguments see ``forward``."""
        # not through the instance, whose two parts may be compiled separately
        tokens = Block.attend(self, tokens, layout, tables, drop, in_place)
        return Block.refine(self, tokens, layout, drop, output, in_place)

    def attend(
        self, tokens: Tensor, layout: Layout, tables: list[RopeTable], drop: DropPath | None, in_place: bool = False
    ) -> Tensor:
        norm, qkv, proj = self.norm1, self.attention.qkv, self.attention.proj
        weights = BranchWeights(norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias, self.scale1.gamma)
        adapters = BranchAdapters(qkv.adapter, proj.adapter)
        return attention_branch(tokens, layout.branch_rows(drop, 0), tables, weights, self.options, in_place, adapters)

    def refine(
        self, tokens: Tensor, layout: Layout, drop: DropPath | None, output: OutputRows | None, in_place: bool = False
    ) -> Tensor:
        norm, first, down = self.norm2, self.mlp.first, self.mlp.down
        weights = BranchWeights(
            norm.weight, norm.bias, first.weight, first.bias, down.weight, down.bias, self.scale2.gamma
        )
        rows = layout.branch_rows(drop, 1) if output is None else output.branch_rows()
        tokens = tokens if output is None else tokens.index_select(0, output.rows)
        return mlp_branch(tokens, rows, weights, self.options, in_place, BranchAdapters(first.adapter, down.adapter))
