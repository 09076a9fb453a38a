"""Gram anchoring preserves the patch similarities of an earlier teacher (Siméoni et al. 2025, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from streamtrain.objective.feature_losses import at_least_fp32

Level = Literal["image", "batch"]
Negatives = Literal["keep", "drop", "drop_teacher"]
Tokens = Literal["all", "masked", "unmasked"]


@dataclass(frozen=True)
class GramTargets:
    """The targets of one micro-batch; called with the student's patches and masks."""

    # the Gram teacher's patches of the global crops, on the student's grid: [images, num_patches, dim]
    features: Tensor
    level: Level
    negatives: Negatives
    tokens: Tokens
    chunk_bytes: int

    def __call__(self, student: Tensor, mask: Tensor) -> Tensor:
        """Return the loss of ``student [images, num_patches, dim]``, ``mask`` bool ``[images, num_patches]``."""
        chosen = {"all": None, "masked": mask, "unmasked": ~mask}[self.tokens]
        return gram_loss(student, self.features, chosen, self.level, self.negatives, self.chunk_bytes)


def gram_loss(
    student: Tensor, teacher: Tensor, chosen: Tensor | None, level: Level, negatives: Negatives, chunk_bytes: int
) -> Tensor:
    """Return the mean squared difference of patches' cosine similarities, ``mean_ij (s_i·s_j − t_i·t_j)²``.

    Like the prototype loss it computes its gradient in the forward, so that only a chunk of a similarity matrix exists
    at a time.

    Args:
        student, teacher: patches ``[images, num_patches, dim]``.
        chosen: bool ``[images, num_patches]``, the patches to include; None: all.
        level: pairs within each ``image``, or within the whole ``batch``.
        negatives: ``keep`` all similarities, set negative ones of both to 0 (``drop``), or only the teacher's.
        chunk_bytes: upper bound of one chunk of a similarity matrix in fp32 (at least one row).

    Returns:
        fp32 scalar; 0 without any patch.
    """
    assert student.shape == teacher.shape, f"student {student.shape} and Gram teacher {teacher.shape} differ"
    units = [F.normalize(at_least_fp32(features), dim=-1, eps=1e-6) for features in (student, teacher.detach())]
    count = units[0].new_full(student.shape[:1], float(student.shape[1]))
    if chosen is not None:
        # a row of zeros has similarity 0 with every row on both sides, so its pairs drop out
        units = [unit * chosen[..., None] for unit in units]
        count = chosen.sum(1).to(count.dtype)
    if level == "batch":
        units = [unit.flatten(0, 1)[None] for unit in units]
        count = count.sum()[None]
    pairs = count.square().sum().clamp_min(1.0)
    loss: Tensor = _GramDifference.apply(*units, negatives, chunk_bytes)
    return loss / pairs


class _GramDifference(torch.autograd.Function):
    """Sum of squared differences of the Gram matrices of unit vectors ``[groups, rows, dim]``."""

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
                target = teacher[here, part] @ teacher[here].transpose(1, 2)
                difference = student[here, part] @ student[here].transpose(1, 2)
                if negatives != "keep":
                    target.clamp_min_(0.0)
                if negatives == "drop":
                    difference.clamp_min_(0.0)
                    # a similarity clamped to 0 has no gradient
                    cut = difference == 0
                    difference -= target
                    total += difference.square().sum()
                    difference.masked_fill_(cut, 0.0)
                else:
                    difference -= target
                    total += difference.square().sum()
                if gradient is not None:
                    # the matrix is symmetric: each row also occurs as a column
                    gradient[here, part] = difference @ student[here] * 4.0
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "this loss keeps its gradient for one backward only"
        return gradient.mul_(grad_outputs[0]), None, None, None


def resize_patches(patches: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Resize patches ``[images, rows * columns, dim]`` bicubically from ``grid`` to ``target``."""
    if grid == target:
        return patches
    image = at_least_fp32(patches).unflatten(1, grid).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=target, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)
