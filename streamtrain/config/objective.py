"""What the student is asked to match (Siméoni et al. 2025, sections 3 and 4)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamtrain.config.model import HeadConfig
from streamtrain.config.schedules import Schedule
from streamtrain.config.section import Positive, Section


class GlobalLossConfig(Section):
    """Cross-entropy between the CLS assignments of student and teacher views."""

    weight: Schedule = Schedule(peak=1.0)
    head: HeadConfig = HeadConfig()


class PatchLossConfig(Section):
    """Masked-patch loss; ``head`` serves ``ibot`` only, ``reduction`` serves ``l2`` and ``cosine`` only."""

    kind: Literal["ibot", "l2", "cosine"] = "ibot"
    weight: Schedule = Schedule(peak=1.0)
    reduction: Literal["sum", "mean"] = "mean"
    head: HeadConfig = HeadConfig()


class KoleoConfig(Section):
    """Kozachenko-Leonenko entropy of the student's global CLS, per view, within a micro-batch."""

    weight: Schedule = Schedule(peak=0.1)


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
