"""Gram anchoring: the student keeps the patch similarities of an earlier teacher (Siméoni et al. 2025, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Level = Literal["image", "batch"]
Negatives = Literal["keep", "drop", "drop_teacher"]
Tokens = Literal["all", "masked", "unmasked"]


@dataclass(frozen=True)
class GramTargets:
    """What the Gram teacher asks of one micro-batch; called with the student's patches and masks."""

    # the Gram teacher's patches of the global crops [images, num_patches, dim], on the student's grid
    features: Tensor
    level: Level
    negatives: Negatives
    tokens: Tokens
    chunk_bytes: int

    def __call__(self, student: Tensor, mask: Tensor) -> Tensor:
        """The loss of ``student [images, num_patches, dim]``, ``mask`` bool ``[images, num_patches]``."""
        chosen = {"all": None, "masked": mask, "unmasked": ~mask}[self.tokens]
        return gram_loss(student, self.features, chosen, self.level, self.negatives, self.chunk_bytes)


def gram_loss(
    student: Tensor, teacher: Tensor, chosen: Tensor | None, level: Level, negatives: Negatives, chunk_bytes: int
) -> Tensor:
    """Mean squared difference of cosine similarities between patches: ``mean_ij (s_i·s_j − t_i·t_j)²``.

    Like the prototype loss it forms its gradient in the forward, so that no similarity matrix outlives a
    chunk of it.

    Args:
        student: patches ``[images, num_patches, dim]``.
        teacher: the same shape.
        chosen: bool ``[images, num_patches]``, the patches that take part; None: all.
        level: pairs within each ``image``, or within the whole ``batch``.
        negatives: ``keep`` all similarities, set negative ones of both to 0 (``drop``), or the teacher's only.
        chunk_bytes: upper bound of one chunk of a similarity matrix in fp32 (at least one row).

    Returns:
        fp32 scalar; 0 where no patch takes part.
    """
    assert student.shape == teacher.shape, f"student {student.shape} and Gram teacher {teacher.shape} differ"
    units = [F.normalize(_wide(features), dim=-1, eps=1e-6) for features in (student, teacher.detach())]
    count = units[0].new_full(student.shape[:1], float(student.shape[1]))
    if chosen is not None:
        # a row of zeros has similarity 0 with everything on both sides, so its pairs drop out
        units = [unit * chosen[..., None] for unit in units]
        count = chosen.sum(1).to(count.dtype)
    if level == "batch":
        units = [unit.flatten(0, 1)[None] for unit in units]
        count = count.sum()[None]
    pairs = count.square().sum().clamp_min(1.0)
    loss: Tensor = _GramDifference.apply(*units, negatives, chunk_bytes)
    return loss / pairs


class _GramDifference(torch.autograd.Function):
    """Sum of squared differences of ``[groups, rows, dim]`` unit vectors' Gram matrices."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, negatives: Negatives, chunk_bytes: int) -> Tensor:
        rows = student.shape[1]
        groups_at_once = max(1, chunk_bytes // (4 * rows * rows))
        rows_at_once = rows if groups_at_once > 1 else max(1, min(rows, chunk_bytes // (4 * rows)))
        total = student.new_zeros(())
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for group in range(0, student.shape[0], groups_at_once):
            here = slice(group, group + groups_at_once)
            for row in range(0, rows, rows_at_once):
                part = slice(row, row + rows_at_once)
                wanted = teacher[here, part] @ teacher[here].transpose(1, 2)
                difference = student[here, part] @ student[here].transpose(1, 2)
                if negatives != "keep":
                    wanted.clamp_min_(0.0)
                if negatives == "drop":
                    difference.clamp_min_(0.0)
                    # a similarity cut to 0 passes no gradient
                    cut = difference == 0
                    difference -= wanted
                    total += difference.square().sum()
                    difference.masked_fill_(cut, 0.0)
                else:
                    difference -= wanted
                    total += difference.square().sum()
                if gradient is not None:
                    # the matrix is symmetric: each row also stands as a column
                    gradient[here, part] = difference @ student[here] * 4.0
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "this loss keeps its gradient for one backward only"
        return gradient.mul_(grad_outputs[0]), None, None, None


def resize_patches(patches: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Patches ``[images, rows * columns, dim]`` of ``grid`` bicubically on ``target``, for larger teacher crops."""
    if grid == target:
        return patches
    image = _wide(patches).unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=target, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)


def _wide(features: Tensor) -> Tensor:
    return features.float() if features.element_size() < 4 else features
