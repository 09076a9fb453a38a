"""What the student is asked to match (Siméoni et al. 2025, sections 3 and 4)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from streamtrain.config.model import HeadConfig
from streamtrain.config.schedules import Schedule
from streamtrain.config.section import NonNegative, Positive, Section
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

    # affects memory and speed only: bytes of one chunk's logits, the prototypes being taken chunk by chunk
    chunk_bytes: int = Field(default=64 * 2**20, ge=2**16)
