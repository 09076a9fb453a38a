"""The rows of the packed ``[num_tokens, dim]`` tensor: each image's tokens, and the rows that a block computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamtrain.ops.branches import BranchRows


@dataclass(frozen=True)
class Group:
    """Crops of one size: ``images`` of them, each ``grid = (rows, columns)`` patches."""

    images: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Order of the packed tokens: by group, then by image; an image is CLS, registers, patches (row-major)."""

    groups: tuple[Group, ...]
    # CLS and register tokens of an image
    num_prefix: int

    def length(self, group: int) -> int:
        """Return the number of tokens of one image of ``group``."""
        height, width = self.groups[group].grid
        return self.num_prefix + height * width

    def lengths(self) -> list[int]:
        """Return the number of tokens of one image of each group."""
        return [self.length(index) for index in range(len(self.groups))]

    def offset(self, group: int) -> int:
        """Return the first row of ``group``; ``offset(len(groups))`` is the number of tokens."""
        return sum(self.groups[index].images * self.length(index) for index in range(group))

    def sizes(self) -> list[int]:
        """Return the number of rows of each group."""
        return [group.images * self.length(index) for index, group in enumerate(self.groups)]

    def cls_rows(self, group: int, device: torch.device) -> Tensor:
        """Return the rows of the CLS tokens of ``group``: int64 ``[images]``."""
        start, length = self.offset(group), self.length(group)
        return start + length * torch.arange(self.groups[group].images, device=device)

    def patch_rows(self, positions: Tensor) -> Tensor:
        """Return the rows of patches of the first group, given as flat positions ``image * num_patches + patch``."""
        length = self.length(0)
        num_patches = length - self.num_prefix
        image = torch.div(positions, num_patches, rounding_mode="floor")
        return image * length + self.num_prefix + positions % num_patches

    def views(self, tokens: Tensor) -> list[Tensor]:
        """View packed ``[num_tokens, ...]`` as one ``[images, length, ...]`` tensor per group."""
        pieces = tokens.split(self.sizes())
        return [piece.unflatten(0, (group.images, -1)) for piece, group in zip(pieces, self.groups, strict=True)]

    def branch_rows(self, drop: DropPath | None, branch: int) -> BranchRows:
        """Return the rows that ``branch`` (0: attention, 1: MLP) of a block computes."""
        if drop is None:
            return BranchRows(None, self.sizes(), self.lengths(), [1.0] * len(self.groups))
        return BranchRows(drop.rows[branch], drop.layout.sizes(), self.lengths(), list(drop.scales))


@dataclass(frozen=True)
class DropPath:
    """Stochastic depth that skips work: each branch of a block computes some of the images (Huang et al. 2016).

    Their number is static, ``max(1, round((1 - rate) * images))`` in every group, so shapes never change.
    """

    # packed rows of the kept images' tokens, int64 [2, kept tokens], one row for each branch
    rows: Tensor
    # layout of the kept tokens
    layout: Layout
    # images / kept images of each group: the factor of a kept branch that preserves the expectation
    scales: tuple[float, ...]


class OutputRows(NamedTuple):
    """The rows of the last block's result that are used."""

    # packed rows of tokens, int64 [output rows], in any order, possibly repeated
    rows: Tensor
    # [output rows, 1]: factor of each row's MLP branch, 0 where drop-path skips it; None: 1
    counts: Tensor | None

    @classmethod
    def create(cls, rows: Tensor, drop: DropPath | None, tokens: Tensor) -> OutputRows:
        """Return the output ``rows`` of ``tokens [num_tokens, dim]``, without a host sync."""
        if drop is None:
            return cls(rows, None)
        # 16 bits would round the counts
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        counts = torch.zeros(len(tokens), 1, dtype=dtype, device=tokens.device)
        for kept, scale in zip(drop.rows[1].split(drop.layout.sizes()), drop.scales, strict=True):
            counts.index_fill_(0, kept, scale)
        return cls(rows, counts.index_select(0, rows))

    def branch_rows(self) -> BranchRows:
        """Return the rows of ``tokens.index_select(0, self.rows)`` that the MLP branch computes."""
        return BranchRows(None, [len(self.rows)], [1], [1.0], self.counts)


def draw_drop_path(
    layout: Layout, depth: int, rate: float, generator: torch.Generator, device: torch.device
) -> list[DropPath]:
    """Draw one ``DropPath`` for each block on ``device``, before any block runs.

    Activation checkpointing replays a block without restoring a private generator, so a block must draw nothing.
    """
    rows, groups, scales = [], [], []
    for index, group in enumerate(layout.groups):
        kept = max(1, round((1.0 - rate) * group.images))
        order = torch.rand(depth, 2, group.images, generator=generator, device=device).argsort(dim=-1)
        images = order[..., :kept].sort(dim=-1).values
        length = layout.length(index)
        tokens = images[..., None] * length + torch.arange(length, device=device)
        rows.append(layout.offset(index) + tokens.flatten(2))
        groups.append(Group(kept, group.grid))
        scales.append(group.images / kept)
    kept_layout = Layout(tuple(groups), layout.num_prefix)
    return [DropPath(block, kept_layout, tuple(scales)) for block in torch.cat(rows, dim=-1)]
