"""Targets of one optimiser step, computed from the teacher's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamtrain.config.objective import ObjectiveConfig
from streamtrain.objective.anchor import AnchorTargets
from streamtrain.objective.gram import GramTargets
from streamtrain.objective.prototypes import WeightHandle
from streamtrain.objective.sinkhorn import Assignment, centered_softmax, sinkhorn, update_center
from streamtrain.ops.chunks import chunk_rows


@dataclass(frozen=True)
class TeacherFeatures:
    """The results of the teacher pass for one micro-batch; None where the term's weight is 0."""

    # bottlenecks of the global crops' CLS tokens, [V * B, d], view-major
    global_features: Tensor | None
    # bottlenecks [M, d] (ibot) or backbone features [M, dim] (l2, cosine) at the masked positions
    patch_features: Tensor | None
    # [M], as in the batch's masks: 0 marks padding
    patch_weight: Tensor
    # backbone features of the global crops' CLS tokens, [V * B, dim], view-major; None if no term uses the teacher
    cls: Tensor | None = None


@dataclass(frozen=True)
class TeacherPrototypes:
    """Handles of the teacher's prototypes; None if the head does not exist."""

    global_head: WeightHandle | None
    patch_head: WeightHandle | None


@dataclass(frozen=True)
class Targets:
    """One micro-batch's features and its part of the step's assignments."""

    features: TeacherFeatures
    teacher_prototypes: TeacherPrototypes
    teacher_temperature: float
    # None without features or without a head
    global_assignment: Assignment | None
    patch_assignment: Assignment | None
    # set by the step (dataclasses.replace) if there is a Gram teacher
    gram: GramTargets | None = None
    # likewise, if there is an anchor
    anchor: AnchorTargets | None = None


class TargetMaker:
    """Computes the targets of an optimiser step from its teacher features.

    Assignments are computed once over all rows of the step (both views together, all micro-batches, all ranks), so
    that they depend neither on the micro-batch nor on the number of ranks; CLS tokens and patches separately.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        # softmax centring: one centre [num_prototypes] per head, created on first use
        self.centers: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def make(
        self, features: Sequence[TeacherFeatures], teacher_prototypes: TeacherPrototypes, teacher_temperature: float
    ) -> list[Targets]:
        """Return the targets of each micro-batch, in order; with softmax centring, then update the centres once."""
        self._before = self.state_dict()
        global_rows = [piece.global_features for piece in features]
        patch_rows = [piece.patch_features for piece in features]
        valid = torch.cat([piece.patch_weight for piece in features]) > 0
        handles = (teacher_prototypes.global_head, teacher_prototypes.patch_head)
        global_parts = self._assign("global_head", global_rows, None, handles[0], teacher_temperature)
        patch_parts = self._assign("patch_head", patch_rows, valid, handles[1], teacher_temperature)
        return [
            Targets(piece, teacher_prototypes, teacher_temperature, of_global, of_patch)
            for piece, of_global, of_patch in zip(features, global_parts, patch_parts, strict=True)
        ]

    def _assign(
        self, head: str, pieces: Sequence[Tensor | None], valid: Tensor | None, handle: WeightHandle | None,
        temperature: float,
    ) -> Sequence[Assignment | None]:  # fmt: skip
        present = [piece for piece in pieces if piece is not None]
        if handle is None or not present:
            return [None] * len(pieces)
        rows = torch.cat(present)
        with handle.gathered() as weight:
            # equal on all ranks, since every rank has the same number of rows
            chunk = chunk_rows(self.config.chunk_size(on_gpu=rows.is_cuda), rows.shape[0], weight.shape[0])
            if self.config.centering == "sinkhorn":
                iterations = self.config.sinkhorn_iterations
                whole = sinkhorn(rows, weight, temperature, iterations, chunk, valid)
            else:
                center = self._center(head, weight, rows, valid)
                whole = centered_softmax(rows, weight, center, temperature, chunk, valid)
                update_center(center, rows, weight, self.config.center_momentum, valid)
        sizes = [piece.shape[0] for piece in present]
        return [Assignment(whole.column, row) for row in whole.row.split(sizes)]

    def _center(self, head: str, weight: Tensor, rows: Tensor, valid: Tensor | None) -> Tensor:
        if head not in self.centers:
            # The average starts at the first step's mean. From zero it would need some twenty steps to get there; until
            # then the targets of all images would be dominated by their common part, and the student would learn that.
            start = self.centers[head] = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
            update_center(start, rows, weight, 0.0, valid)
        center = self.centers[head] = self.centers[head].to(weight.device)
        return center

    def revert(self) -> None:
        """Restore the centres from before the last ``make``."""
        self.centers = self._before

    def state_dict(self) -> dict[str, Tensor]:
        """Return the centres; empty with Sinkhorn."""
        return {name: center.clone() for name, center in self.centers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.centers = {name: center.clone() for name, center in state.items()}


def view_pairs(num_global: int, num_local: int, batch: int, device: torch.device) -> Tensor:
    """Return the teacher rows of each student row, both view-major: int64 ``[(V + L) * batch, V]``, −1 for none.

    A global view is compared with the other global views of its image, a local view with all of them.
    """
    teacher = torch.arange(num_global, device=device)
    student = torch.arange(num_global + num_local, device=device)
    rows = teacher[None, None, :] * batch + torch.arange(batch, device=device)[None, :, None]
    same = (student[:, None] == teacher[None, :])[:, None, :]
    return torch.where(same, -1, rows).flatten(0, 1)


def view_weights(
    num_global: int, num_local: int, batch: int, device: torch.device, local_weight: float = 1.0
) -> Tensor:
    """Return the weight of each student row, ``[(V + L) * batch]``, so that all pairs of views weigh the same.

    The global part then weighs V(V − 1) of the sum and the local part V·L; ``local_weight`` scales the local part.
    """
    pairs = num_global * (num_global - 1) + num_global * num_local
    of_global = torch.full((num_global * batch,), float(num_global - 1), device=device)
    of_local = torch.full((num_local * batch,), local_weight * num_global, device=device)
    return torch.cat([of_global, of_local]) / (max(1, pairs) * batch)
