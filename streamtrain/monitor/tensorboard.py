"""The event file: scalars, images and text for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

# Charts of the "custom scalars" page: what belongs together on one chart, each by patterns of tags.
LAYOUT = {
    "learning": {
        "losses": ["Multiline", ["loss/.*"]],
        "evaluation": ["Multiline", ["eval/.*"]],
        "collapse: rank and entropy": ["Multiline", ["features/.*", "teacher/entropy.*"]],
        "gradient norm": ["Multiline", ["optim/gradient_norm.*"]],
    },
    "schedules": {
        "learning rate": ["Multiline", ["optim/lr.*"]],
        "teacher": ["Multiline", ["teacher/momentum", "teacher/temperature"]],
    },
    "machine": {
        "images per second": ["Multiline", ["speed/images_per_second"]],
        "share of the step spent waiting for data": ["Multiline", ["data/wait_share"]],
        "memory": ["Multiline", ["memory/.*"]],
    },
}


class EventWriter:
    """Writes to ``folder``; what an earlier start logged after ``start_step`` is hidden by TensorBoard."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)
        self._writer.add_custom_scalars(LAYOUT)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Those that are not finite are left out."""
        for tag, value in scalars.items():
            if math.isfinite(value):
                self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        """``image``: uint8 [height, width, 3]."""
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def histogram(self, tag: str, step: int, values: Tensor) -> None:
        """Distribution of all ``values``; those that are not finite are left out."""
        finite = values.detach().flatten().float()
        finite = finite[finite.isfinite()]
        if len(finite):
            self._writer.add_histogram(tag, finite.cpu(), step)

    def embedding(self, tag: str, step: int, features: Tensor, labels: Sequence[str], thumbnails: Tensor) -> None:
        """Points for the projector: features [N, D], a name each, thumbnails uint8 [N, side, side, 3]."""
        images = thumbnails.permute(0, 3, 1, 2).float() / 255
        self._writer.add_embedding(features.float().cpu(), list(labels), images, step, tag)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """``text``: Markdown."""
        self._writer.add_text(tag, text, step)

    def close(self) -> None:
        self._writer.close()
