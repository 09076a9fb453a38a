"""The vision transformer on packed tokens: all crops of a micro-batch as one ``[num_tokens, dim]`` tensor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamtrain.config.model import ModelConfig
from streamtrain.model.layers import Block, LayerNorm, Linear
from streamtrain.model.layout import DropPath, Group, Layout, OutputRows, draw_drop_path
from streamtrain.model.rope import Rope
from streamtrain.ops.host_memory import HostOffload


class Features(NamedTuple):
    """Normalised features of one crop size."""

    # [images, dim]
    cls: Tensor
    # [images, num_registers, dim]
    registers: Tensor
    # [images, num_patches, dim], row-major
    patches: Tensor


class Embedding(nn.Module):
    """Pixels to tokens: CLS and register tokens, then the patches through one linear layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        # columns in the order (channel, y, x): reshaped to [dim, channels, p, p] it is the published convolution
        self.projection = Linear(config.channels * config.patch_size**2, config.dim)
        self.cls_token = nn.Parameter(torch.empty(1, config.dim))
        # None: DeepSpeed has no place for an empty parameter
        self.register_tokens = (
            nn.Parameter(torch.empty(config.num_registers, config.dim)) if config.num_registers else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, config.dim))

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
        """Embed and pack crops ``[images, channels, height, width]`` per size, with masks ``[images, num_patches]``."""
        patches = [self._unfold(images) for images in crops]
        embedded = self.projection(torch.cat([piece.flatten(0, 1) for piece in patches]))
        prefix = self.prefix()
        pieces = embedded.split([piece.shape[0] * piece.shape[1] for piece in patches])
        tokens = []
        for piece, images, mask in zip(pieces, crops, masks, strict=True):
            piece = piece.unflatten(0, (images.shape[0], -1))
            if mask is not None:
                piece = torch.where(mask[..., None], self.mask_token, piece)
            tokens.append(torch.cat([prefix.expand(images.shape[0], -1, -1), piece], dim=1).flatten(0, 1))
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def prefix(self) -> Tensor:
        """Return the tokens before the patches, [1 + num_registers, dim]."""
        registers = self.register_tokens
        return self.cls_token if registers is None else torch.cat([self.cls_token, registers])

    def _unfold(self, images: Tensor) -> Tensor:
        """Reshape ``[images, channels, height, width]`` to ``[images, num_patches, channels * patch_size²]``."""
        num_images, channels, height, width = images.shape
        size = self.patch_size
        patches = images.reshape(num_images, channels, height // size, size, width // size, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return patches.to(self.cls_token.dtype)


def has_gradient(module: nn.Module) -> bool:
    """Return whether any parameter of a module trains."""
    return any(parameter.requires_grad for parameter in module.parameters())


class VisionTransformer(nn.Module):
    """A DINOv3-style backbone (Siméoni et al. 2025, section 3.2). All parameters are in its submodules."""

    def __init__(
        self, config: ModelConfig, checkpointing: str = "none", view_groups: int = 1, offload: bool = False
    ) -> None:
        """Build a backbone with activation checkpointing, which changes no gradient; CPU kernels always recompute.

        Args:
            checkpointing: recompute ``none``, ``selective`` (each block's MLP branch) or ``block`` (each whole block).
            view_groups: recompute in this many groups of images.
            offload: with ``block``, keep the activations between the blocks in host memory.
        """
        super().__init__()
        if checkpointing not in ("none", "selective", "block"):
            raise ValueError(f"checkpointing must be 'none', 'selective' or 'block', not {checkpointing!r}")
        self.patch_size = config.patch_size
        self.num_prefix = 1 + config.num_registers
        self.drop_rate = config.drop_path
        self.checkpointing = checkpointing
        self.offload = offload
        self.rope = Rope(config)
        self.embedding = Embedding(config)
        lora = [config.lora if index in config.adapted_blocks else None for index in range(config.depth)]
        self.blocks = nn.ModuleList([Block(config, checkpointing == "selective", view_groups, each) for each in lora])
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        # None: ``norm`` applies to it too
        self.cls_norm = LayerNorm(config.dim, eps=config.norm_eps) if config.cls_norm else None
        self.local_norm = LayerNorm(config.dim, eps=config.norm_eps) if config.local_norm else None

    def layout(self, crops: Sequence[Tensor]) -> Layout:
        """Return the layout of the tokens of ``crops``.

        Raises:
            ValueError: if a crop is not a whole number of patches.
        """
        groups = []
        for images in crops:
            height, width = images.shape[-2:]
            if height % self.patch_size or width % self.patch_size:
                raise ValueError(
                    f"images of {height} x {width} pixels are not a whole number of {self.patch_size}-pixel patches"
                )
            groups.append(Group(images.shape[0], (height // self.patch_size, width // self.patch_size)))
        return Layout(tuple(groups), self.num_prefix)

    def encode(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], generator: torch.Generator | None = None,
        chunk: int = 0, keep: Sequence[int] = (), rows: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Return packed tokens before the final norm, and copies of the stream after the blocks in ``keep``.

        With a generator (training) drop-path and RoPE augmentation are drawn from it; without one there are none.
        ``chunk`` > 0, only without gradients, bounds the images in flight within a block. With ``rows``, int64, only
        these tokens are returned, and the MLP branch of the last block computes only them.
        """
        assert rows is None or len(self.blocks) - 1 not in keep
        layout = self.layout(crops)
        tokens = self.embedding(crops, masks)
        tables = [self.rope.table(group.grid, tokens.device, tokens.dtype, generator) for group in layout.groups]
        drops: list[DropPath | None] = [None] * len(self.blocks)
        if generator is not None and self.drop_rate > 0.0:
            drops = [*draw_drop_path(layout, len(self.blocks), self.drop_rate, generator, tokens.device)]
        kept = []
        recompute = self.checkpointing == "block" and torch.is_grad_enabled()
        on_host = HostOffload() if recompute and self.offload else None
        for index, (block, drop) in enumerate(zip(self.blocks, drops, strict=True)):
            assert isinstance(block, Block)
            if not tokens.requires_grad and torch.is_grad_enabled() and has_gradient(block):
                # Everything below is frozen. ZeRO-3 ends a block's backward at the gradient of its input.
                tokens = tokens.detach().requires_grad_()
            is_last = index == len(self.blocks) - 1
            output = OutputRows.create(rows, drop, tokens) if is_last and rows is not None else None
            if recompute and not block.is_tiled(tokens):
                # nothing random happens inside a block, so no random state needs saving
                with on_host.hooks() if on_host else nullcontext():
                    tokens = checkpoint(
                        block, tokens, layout, tables, drop, 0, output, use_reentrant=False, preserve_rng_state=False
                    )
            else:
                tokens = block(tokens, layout, tables, drop, chunk, output)
            if index in keep:
                kept.append(tokens.clone() if chunk else tokens)
        if on_host is not None:
            on_host.finish()
        return tokens, kept

    def forward(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None,
        generator: torch.Generator | None = None, chunk: int = 0,
    ) -> tuple[Features, ...]:  # fmt: skip
        """Return normalised features of each crop size; the first is the global crops, any other local crops.

        A separate norm for CLS and registers of local crops applies in training (with a generator) only.
        """
        tokens, _ = self.encode(crops, masks or [None] * len(crops), generator, chunk)
        return tuple(
            self._features(view, self.norm_of_local_cls if index and generator is not None else self.norm_of_cls)
            for index, view in enumerate(self.layout(crops).views(tokens))
        )

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Return the initial value of a parameter, or None for the built-in rule; for subclasses with parameters.

        Draw from ``generator`` only, so that the value is the same on any number of ranks.
        """
        return None

    @property
    def norm_of_cls(self) -> LayerNorm:
        """The final norm of CLS and register tokens."""
        return self.norm if self.cls_norm is None else self.cls_norm

    @property
    def norm_of_local_cls(self) -> LayerNorm:
        """The final norm of the CLS and register tokens of local crops in training."""
        return self.norm_of_cls if self.local_norm is None else self.local_norm

    def forward_features(self, images: Tensor, chunk: int = 0) -> Features:
        """Return features of ``[images, channels, height, width]`` of any size, without masks: for evaluation."""
        return self([images], chunk=chunk)[0]

    def get_intermediate_layers(
        self, images: Tensor, layers: int | Sequence[int] = 1, norm: bool = True
    ) -> list[Features]:
        """Return features after the last ``layers`` blocks, or after the listed blocks in ascending order."""
        depth = len(self.blocks)
        keep = range(depth - layers, depth) if isinstance(layers, int) else sorted(layers)
        if any(not 0 <= index < depth for index in keep):
            raise ValueError(f"layers {list(keep)} are not all among the {depth} blocks of this model")
        _, kept = self.encode([images], [None], keep=keep)
        layout = self.layout([images])
        views = [layout.views(tokens)[0] for tokens in kept]
        return [self._features(view, self.norm_of_cls) if norm else self._split(view) for view in views]

    def _features(self, view: Tensor, prefix_norm: LayerNorm) -> Features:
        """Normalise and split the tokens ``[images, length, dim]`` of one size."""
        if prefix_norm is self.norm:
            return self._split(self.norm(view))
        prefix, patches = prefix_norm(view[:, : self.num_prefix]), self.norm(view[:, self.num_prefix :])
        return Features(prefix[:, 0], prefix[:, 1:], patches)

    def _split(self, view: Tensor) -> Features:
        return Features(view[:, 0], view[:, 1 : self.num_prefix], view[:, self.num_prefix :])
