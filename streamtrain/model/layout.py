"""Where each image's tokens lie in the packed ``[num_tokens, dim]`` tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Crops of one size: ``images`` of them, each ``grid = (rows, columns)`` patches."""

    images: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Group after group, image after image; an image is CLS, registers, patches (row-major)."""

    groups: tuple[Group, ...]
    # CLS and register tokens of an image
    num_prefix: int

    def length(self, group: int) -> int:
        """Tokens of one image of ``group``."""
        height, width = self.groups[group].grid
        return self.num_prefix + height * width

    def offset(self, group: int) -> int:
        """First token row of ``group``; ``offset(len(groups))`` is the number of tokens."""
        return sum(self.groups[index].images * self.length(index) for index in range(group))

    def sizes(self) -> list[int]:
        """Token rows of each group."""
        return [group.images * self.length(index) for index, group in enumerate(self.groups)]

    def cls_rows(self, group: int, device: torch.device) -> Tensor:
        """Packed rows of the CLS tokens of ``group``: int64 ``[images]``."""
        start, length = self.offset(group), self.length(group)
        return start + length * torch.arange(self.groups[group].images, device=device)

    def patch_rows(self, group: int, positions: Tensor) -> Tensor:
        """Packed rows of patches given as flat positions ``image * num_patches + patch`` within ``group``."""
        length = self.length(group)
        num_patches = length - self.num_prefix
        image = torch.div(positions, num_patches, rounding_mode="floor")
        return self.offset(group) + image * length + self.num_prefix + positions % num_patches

    def views(self, tokens: Tensor) -> list[Tensor]:
        """Packed ``[num_tokens, ...]`` as one ``[images, length, ...]`` view a group."""
        pieces = tokens.split(self.sizes())
        return [piece.unflatten(0, (group.images, -1)) for piece, group in zip(pieces, self.groups, strict=True)]
