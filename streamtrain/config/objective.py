"""What the student is asked to match (Siméoni et al. 2025, sections 3 and 4)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from streamtrain.config.model import HeadConfig
from streamtrain.config.schedules import Schedule
from streamtrain.config.section import NonNegative, Positive, Section, Steps
from streamtrain.errors import ConfigError


class GlobalLossConfig(Section):
    """Cross-entropy between the CLS assignments of student and teacher views."""

    weight: Schedule = Schedule(peak=1.0)
    # of the local views' part of it
    local_weight: Schedule = Schedule(peak=1.0)
    head: HeadConfig = HeadConfig()


class PatchLossConfig(Section):
    """Masked-patch loss; ``head`` serves ``ibot`` only, ``reduction`` serves ``l2`` and ``cosine`` only."""

    kind: Literal["ibot", "l2", "cosine"] = "ibot"
    weight: Schedule = Schedule(peak=1.0)
    reduction: Literal["sum", "mean"] = "mean"
    head: HeadConfig = HeadConfig()


class KoleoConfig(Section):
    """Kozachenko-Leonenko entropy of the student's global CLS, per view."""

    weight: Schedule = Schedule(peak=0.1)
    # nearest neighbours that a sample is driven from
    neighbours: Positive = 1
    # neighbours among the samples of all ranks, or of one rank's micro-batch
    distributed: bool = False
    # with distributed: samples of a group within which neighbours are sought; 0: all
    group_size: NonNegative = 0

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> KoleoConfig:
        if self.group_size and not self.distributed:
            raise ValueError("group_size has an effect only with distributed: true")
        return self

    def samples(self, micro_batch: int, world_size: int) -> int:
        """Samples among which neighbours are sought.

        Raises:
            ConfigError: if the samples of a micro-batch on all ranks do not divide into such groups.
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
    """When the Gram teacher becomes a copy of the EMA teacher again."""

    # after so many completed steps for the first time; null: never
    first: Steps | None = None
    # and again after each so many further ones; 0: no further time
    every: Steps = 0
    # times at most; 0: no limit
    limit: NonNegative = 0

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> RefreshConfig:
        if self.first is None and (self.every or self.limit):
            raise ValueError("every and limit have an effect only with first")
        if self.limit and not self.every:
            raise ValueError("limit has an effect only with every")
        return self

    def due(self, step: int) -> bool:
        """Whether it happens after ``step`` completed steps."""
        if self.first is None or step < self.first:
            return False
        count, rest = divmod(step - self.first, self.every) if self.every else (0, step - self.first)
        return rest == 0 and (not self.limit or count < self.limit)


class GramConfig(Section):
    """Gram anchoring: the student keeps the patch similarities of an earlier teacher; off where ``weight`` is 0."""

    weight: Schedule = Schedule(peak=0.0)
    # a backbone as in init.weights, or ema: a copy of the EMA teacher at the first step with a weight above 0
    teacher: str = "ema"
    refresh: RefreshConfig = RefreshConfig()
    # side in pixels of its crops: the global views' boxes and flips without their colours; null: the global views
    size: Positive | None = None
    # pairs of patches within each image, or within the whole micro-batch
    level: Literal["image", "batch"] = "image"
    # similarities below 0: kept, set to 0 on both sides, or on the teacher's
    negatives: Literal["keep", "drop", "drop_teacher"] = "keep"
    # patches that take part
    tokens: Literal["all", "masked", "unmasked"] = "all"

    @property
    def active(self) -> bool:
        """Whether the run needs a Gram teacher."""
        return self.weight.ever_positive


class ObjectiveConfig(Section):
    """``objective``: all of it affects results but ``chunk_bytes``."""

    centering: Literal["sinkhorn", "softmax"] = "sinkhorn"
    sinkhorn_iterations: Positive = 3
    # of the softmax centre
    center_momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    student_temperature: float = Field(default=0.1, gt=0.0)
    global_loss: GlobalLossConfig = GlobalLossConfig()
    patch_loss: PatchLossConfig = PatchLossConfig()
    koleo: KoleoConfig = KoleoConfig()
    gram: GramConfig = GramConfig()

    # affects memory and speed only: bytes of one chunk's logits, the prototypes being taken chunk by chunk;
    # the CPU's kernels take 64 at a time
    chunk_bytes: int = Field(default=8 * 2**20, ge=2**16)
