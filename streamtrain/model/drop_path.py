"""Stochastic depth that skips work: a residual branch computes the kept images only (Huang et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from streamtrain.model.layout import Group, Layout


@dataclass(frozen=True)
class DropPath:
    """The images of one block that each of its two branches computes.

    The count is static, ``max(1, round((1 - rate) * images))`` in every group, so shapes never change.
    """

    # packed rows of the kept images' tokens, int64 [2, kept tokens], one row a branch
    rows: Tensor
    # of the kept tokens
    layout: Layout
    # images / kept images of each group: what a kept branch counts, so that the expectation stays
    scales: tuple[float, ...]

    def select(self, tokens: Tensor, branch: int) -> Tensor:
        """The kept rows of ``tokens [num_tokens, dim]`` for ``branch`` 0 or 1."""
        return tokens.index_select(0, self.rows[branch])

    def add(self, tokens: Tensor, update: Tensor, branch: int) -> Tensor:
        """``tokens`` plus the scaled ``update [kept tokens, dim]`` at the kept rows, as a new tensor."""
        sizes = self.layout.sizes()
        pieces = zip(self.rows[branch].split(sizes), update.split(sizes), self.scales, strict=True)
        result = tokens.clone()
        for rows, piece, scale in pieces:
            result.index_add_(0, rows, piece, alpha=scale)
        return result


class Wanted(NamedTuple):
    """The rows of a last block's result that somebody reads."""

    # packed rows of tokens, int64 [wanted rows], in any order and as often as wanted
    rows: Tensor
    # [wanted rows, 1]: what the MLP branch of each counts, 0 where drop-path leaves it out; None: 1
    counts: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, drop: DropPath | None, tokens: Tensor) -> Wanted:
        """``rows`` of ``tokens [num_tokens, dim]``. How many of them are left out is never asked: no host waits."""
        if drop is None:
            return cls(rows, None)
        # in 16 bits a count would be rounded
        exact = torch.promote_types(tokens.dtype, torch.float32)
        counts = torch.zeros(len(tokens), 1, dtype=exact, device=tokens.device)
        for kept, scale in zip(drop.rows[1].split(drop.layout.sizes()), drop.scales, strict=True):
            counts.index_fill_(0, kept, scale)
        return cls(rows, counts.index_select(0, rows))


def draw(layout: Layout, depth: int, rate: float, generator: torch.Generator, device: torch.device) -> list[DropPath]:
    """One ``DropPath`` a block, drawn on ``device`` before any block runs.

    Checkpointing replays a block without restoring a private generator, so a block must draw nothing itself.
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
