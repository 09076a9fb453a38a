"""What the teacher asks of the student in one optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from streamtrain.objective.gram import GramTargets
from streamtrain.objective.logits import chunk_rows
from streamtrain.objective.prototypes import WeightHandle
from streamtrain.objective.sinkhorn import Assignment, centered_softmax, sinkhorn, update_center


@dataclass(frozen=True)
class TeacherFeatures:
    """What the teacher pass keeps of one micro-batch; None where the term's weight is 0."""

    # bottlenecks of the global crops' CLS, [V * B, d], view-major
    global_features: Tensor | None
    # bottlenecks [M, d] (ibot) or backbone features [M, dim] (l2, cosine) at the masked positions
    patch_features: Tensor | None
    # [M], as in the batch's masks: 0 marks padding
    patch_weight: Tensor
    # backbone's CLS of the global crops, [V * B, dim], view-major; None where no term asks the teacher
    cls: Tensor | None = None


@dataclass(frozen=True)
class PrototypeHandles:
    """Ways to the teacher's prototypes; None where there is no such head."""

    global_head: WeightHandle | None
    patch_head: WeightHandle | None


@dataclass(frozen=True)
class Targets:
    """One micro-batch's features, with its part of the step's assignments."""

    features: TeacherFeatures
    handles: PrototypeHandles
    teacher_temperature: float
    # None where there are no features, or no head
    global_assignment: Assignment | None
    patch_assignment: Assignment | None
    # set by the step (dataclasses.replace) where there is a Gram teacher
    gram: GramTargets | None = None


class TargetSettings(Protocol):
    """The keys of the ``objective`` section that decide the targets."""

    @property
    def centering(self) -> str:
        """``sinkhorn`` or ``softmax``."""
        ...

    @property
    def sinkhorn_iterations(self) -> int: ...

    @property
    def center_momentum(self) -> float:
        """Of the softmax centre."""
        ...

    @property
    def chunk_bytes(self) -> int:
        """Upper bound of one chunk's fp32 logits."""
        ...


class TargetMaker:
    """Turns the teacher features of an optimiser step into targets.

    Assignments are computed once over all rows of the step (both views together, all micro-batches, all
    ranks), so that they depend neither on the micro-batch nor on the number of ranks; CLS and patches
    separately.
    """

    def __init__(self, config: TargetSettings, group: dist.ProcessGroup | None = None) -> None:
        """``group``: the ranks that share a step; None: all."""
        self.config = config
        self.group = group
        # softmax centring: one centre [num_prototypes] a head, made when first needed
        self.centers: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def make(
        self, features: Sequence[TeacherFeatures], handles: PrototypeHandles, teacher_temperature: float
    ) -> list[Targets]:
        """Targets of each micro-batch, in order. With softmax centring the centres move once, afterwards."""
        self._before = self.state_dict()
        global_rows = [piece.global_features for piece in features]
        patch_rows = [piece.patch_features for piece in features]
        valid = torch.cat([piece.patch_weight for piece in features]) > 0
        global_parts = self._assign("global_head", global_rows, None, handles.global_head, teacher_temperature)
        patch_parts = self._assign("patch_head", patch_rows, valid, handles.patch_head, teacher_temperature)
        return [
            Targets(piece, handles, teacher_temperature, of_global, of_patch)
            for piece, of_global, of_patch in zip(features, global_parts, patch_parts, strict=True)
        ]

    def _assign(
        self,
        head: str,
        pieces: Sequence[Tensor | None],
        valid: Tensor | None,
        handle: WeightHandle | None,
        temperature: float,
    ) -> Sequence[Assignment | None]:
        present = [piece for piece in pieces if piece is not None]
        if handle is None or not present:
            return [None] * len(pieces)
        rows = torch.cat(present)
        with handle.gathered() as weight:
            # equal on all ranks, since every rank has as many rows
            chunk = chunk_rows(self.config.chunk_bytes, rows.shape[0], weight.shape[0])
            if self.config.centering == "sinkhorn":
                iterations = self.config.sinkhorn_iterations
                whole = sinkhorn(rows, weight, temperature, iterations, chunk, self.group, valid)
            else:
                center = self._center(head, weight, rows, valid)
                whole = centered_softmax(rows, weight, center, temperature, chunk, valid)
                update_center(center, rows, weight, self.config.center_momentum, self.group, valid)
        sizes = [piece.shape[0] for piece in present]
        return [Assignment(whole.column, row) for row in whole.row.split(sizes)]

    def _center(self, head: str, weight: Tensor, rows: Tensor, valid: Tensor | None) -> Tensor:
        if head not in self.centers:
            # The average begins at the first step's mean. From zero, it would take some twenty steps to get there; the
            # targets of all images would be what they have in common until then, and the student would learn that.
            start = self.centers[head] = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
            update_center(start, rows, weight, 0.0, self.group, valid)
        center = self.centers[head] = self.centers[head].to(weight.device)
        return center

    def revert(self) -> None:
        """Put the centres back to where they were before the last ``make``."""
        self.centers = self._before

    def state_dict(self) -> dict[str, Tensor]:
        """The centres; empty with Sinkhorn."""
        return {name: center.clone() for name, center in self.centers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the centres of ``state_dict()``."""
        self.centers = {name: center.clone() for name, center in state.items()}


def view_pairs(num_global: int, num_local: int, batch: int, device: torch.device) -> Tensor:
    """Teacher rows of each student row, both view-major: int64 ``[(V + L) * batch, V]``, −1 for none.

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
    """What each student row counts, ``[(V + L) * batch]``: every pair of views the same.

    The global and the local part so weigh V(V − 1) and V·L of their sum; ``local_weight`` further scales the
    local one.
    """
    pairs = num_global * (num_global - 1) + num_global * num_local
    of_global = torch.full((num_global * batch,), float(num_global - 1), device=device)
    of_local = torch.full((num_local * batch,), local_weight * num_global, device=device)
    return torch.cat([of_global, of_local]) / (max(1, pairs) * batch)
