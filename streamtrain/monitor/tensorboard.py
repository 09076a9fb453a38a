"""The event file: scalars, images and text for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter


class EventWriter:
    """Writes to ``folder``; what an earlier start logged after ``start_step`` is hidden by TensorBoard."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        """``image``: uint8 [height, width, 3]."""
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def text(self, tag: str, text: str) -> None:
        """``text``: Markdown."""
        self._writer.add_text(tag, text, 0)

    def close(self) -> None:
        self._writer.close()
