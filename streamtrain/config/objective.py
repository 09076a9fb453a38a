"""The ``objective`` section: losses and their weights (Siméoni et al. 2025, sections 3 and 4)."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from streamtrain.config.model import HeadConfig
from streamtrain.config.schedules import Schedule
from streamtrain.config.section import (
    CropSize,
    NonNegative,
    PathText,
    Positive,
    Section,
    Size,
    Steps,
    accept,
    fixed,
    free,
)
from streamtrain.errors import ConfigError


class GlobalLossConfig(Section):
    """Global loss: cross-entropy between the CLS assignments of student and teacher views."""

    weight: Schedule = accept(Schedule(peak=1.0), "Weight of the global loss in the total loss.")
    local_weight: Schedule = accept(Schedule(peak=1.0), "Weight of the local views within the global loss.")
    head: HeadConfig = HeadConfig()


class PatchLossConfig(Section):
    """Masked-patch loss. ``head`` is used by ``ibot`` only, ``reduction`` by ``l2`` and ``cosine`` only."""

    kind: Literal["ibot", "l2", "cosine"] = fixed(
        "ibot", "Cross-entropy of assignments (ibot), or squared / cosine distance of backbone features."
    )
    weight: Schedule = accept(Schedule(peak=1.0), "Weight of the masked-patch loss in the total loss.")
    reduction: Literal["sum", "mean"] = accept("mean", "Reduction over the masked patches of a crop (l2 and cosine).")
    head: HeadConfig = HeadConfig()


class KoleoConfig(Section):
    """KoLeo: Kozachenko-Leonenko entropy of the student's global CLS tokens, per view."""

    weight: Schedule = accept(Schedule(peak=0.1), "Weight of KoLeo in the total loss.")
    neighbours: Positive = accept(1, "Number of nearest neighbours that each sample is pushed away from.")
    distributed: bool = accept(False, "Search for neighbours among the samples of all ranks, not one micro-batch.")
    group_size: NonNegative = accept(
        0, "With distributed: number of samples of a group that is searched for neighbours; 0: all samples."
    )

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> KoleoConfig:
        if self.group_size and not self.distributed:
            raise ValueError("group_size has an effect only with distributed: true")
        return self

    def samples(self, micro_batch: int, world_size: int) -> int:
        """Return the number of samples among which neighbours are searched.

        Raises:
            ConfigError: the micro-batches of all ranks do not divide into groups of ``group_size``.
        """
        if not self.distributed:
            return micro_batch
        size = self.group_size or micro_batch * world_size
        if (micro_batch * world_size) % size or (micro_batch % size and size % micro_batch):
            raise ConfigError(
                f"objective.koleo.group_size {size} does not fit data.micro_batch {micro_batch} x {world_size} ranks; "
                f"choose a divisor of {micro_batch}, or a multiple of it that divides {micro_batch * world_size}"
            )
        return size


class RefreshConfig(Section):
    """Refreshes of the Gram teacher with the values of the EMA teacher."""

    first: Steps | None = accept(None, "Number of completed steps before the first refresh; null: no refresh.")
    every: Steps = accept(0, "Steps between further refreshes; 0: no further refresh.")
    limit: NonNegative = accept(0, "Maximum number of refreshes; 0: no limit.")

    @model_validator(mode="after")
    def _reject_ineffective_keys(self) -> RefreshConfig:
        if self.first is None and (self.every or self.limit):
            raise ValueError("every and limit have an effect only with first")
        if self.limit and not self.every:
            raise ValueError("limit has an effect only with every")
        return self

    def is_due(self, step: int) -> bool:
        """Whether the Gram teacher is refreshed after ``step`` completed steps."""
        if self.first is None or step < self.first:
            return False
        count, rest = divmod(step - self.first, self.every) if self.every else (0, step - self.first)
        return rest == 0 and (not self.limit or count < self.limit)


class GramConfig(Section):
    """Gram anchoring: keeps the student's patch similarities close to an earlier teacher's; off with weight 0."""

    weight: Schedule = accept(Schedule(peak=0.0), "Weight of the Gram loss in the total loss.")
    teacher: PathText = accept(
        "ema", "Backbone as in init.weights, or ema: a copy of the EMA teacher at the first step with weight > 0."
    )
    refresh: RefreshConfig = RefreshConfig()
    size: CropSize | None = accept(
        None, "Size of the Gram teacher's crops in pixels (boxes and flips of the global views, without colour "
        "changes); null: the global views.",
    )  # fmt: skip
    level: Literal["image", "batch"] = accept("image", "Compare pairs of patches within an image or a micro-batch.")
    negatives: Literal["keep", "drop", "drop_teacher"] = accept(
        "keep", "Negative similarities: keep, set to 0 for student and teacher (drop), or for the teacher only."
    )
    tokens: Literal["all", "masked", "unmasked"] = accept("all", "Patches that are compared.")

    @property
    def is_active(self) -> bool:
        return self.weight.is_ever_positive

    @property
    def has_weights(self) -> bool:
        """Whether the Gram teacher starts with the weights of a file or folder."""
        return self.is_active and self.teacher != "ema"


class AnchorConfig(Section):
    """Anchor: keeps the student's features of global crops close to the starting network's; off with weight 0.

    The starting network is the backbone of ``init.weights``, or the teacher of the checkpoint given with ``--resume``.
    """

    weight: Schedule = accept(Schedule(peak=0.0), "Weight of the anchor loss in the total loss.")
    cls: Literal["cosine", "none"] = accept("cosine", "Compare CLS features: mean of 1 - cosine similarity, or not.")
    patches: Literal["gram", "cosine", "none"] = accept(
        "gram", "Compare patches, masked and visible: their similarities within an image (gram), each patch (cosine), "
        "or not.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _reject_empty_term(self) -> AnchorConfig:
        if self.is_active and self.cls == self.patches == "none":
            raise ValueError("with weight above 0, at least one of cls and patches must not be none")
        return self

    @property
    def is_active(self) -> bool:
        return self.weight.is_ever_positive


class ObjectiveConfig(Section):
    """Losses and their targets. The total loss is the weighted sum of the five losses."""

    centering: Literal["sinkhorn", "softmax"] = accept(
        "sinkhorn", "Teacher targets by Sinkhorn-Knopp, or by softmax with an EMA centre."
    )
    sinkhorn_iterations: Positive = accept(3, "Sinkhorn-Knopp iterations.")
    center_momentum: float = accept(0.9, "Momentum of the softmax centre, updated once per step.", ge=0.0, lt=1.0)
    student_temperature: float = accept(0.1, "Temperature of the student's softmax.", gt=0.0)
    global_loss: GlobalLossConfig = GlobalLossConfig()
    patch_loss: PatchLossConfig = PatchLossConfig()
    koleo: KoleoConfig = KoleoConfig()
    gram: GramConfig = GramConfig()
    anchor: AnchorConfig = AnchorConfig()
    chunk_bytes: Size | None = free(
        None, "Bytes of logits in memory at a time (one chunk of prototypes); null: 128 MiB on a GPU, 8 MiB on a CPU. "
        "The CPU kernels use chunks of 64 prototypes instead.", ge=2**16,
    )  # fmt: skip

    @property
    def has_gram_matrices(self) -> bool:
        """Whether any term compares similarities between patches."""
        return self.gram.is_active or (self.anchor.is_active and self.anchor.patches == "gram")

    @property
    def compares_all_patches(self) -> bool:
        """Whether any term needs the student's features of all patches of the global crops."""
        return self.gram.is_active or (self.anchor.is_active and self.anchor.patches != "none")

    def chunk_size(self, *, on_gpu: bool) -> int:
        """Return the bytes of a chunk on a GPU or on a CPU."""
        return self.chunk_bytes or (128 if on_gpu else 8) * 2**20
