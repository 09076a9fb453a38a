"""The event file: scalars, images, histograms and text for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from streamtrain.config.tree import Config
from streamtrain.reporting.layout import LAYOUT, OUTCOMES, hyperparameters


class EventWriter:
    """Writes to ``folder``; what an earlier start logged after ``start_step`` is hidden by TensorBoard."""

    def __init__(self, folder: Path, start_step: int, config: Config) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=10)
        self._writer.add_custom_scalars(LAYOUT)
        # the writer's own method for these would open a further run folder
        values = hparams(hyperparameters(config), dict.fromkeys(OUTCOMES))
        file_writer = self._writer._get_file_writer()
        for summary in values:
            file_writer.add_summary(summary)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Finite values by tag."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        """``image``: uint8 [height, width, 3]."""
        self._writer.add_image(tag, image, step, dataformats="HWC")

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        """``values``: finite, fp32 [n]."""
        self._writer.add_histogram(tag, values, step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """``text``: Markdown."""
        self._writer.add_text(tag, text, step)

    def close(self) -> None:
        self._writer.close()
