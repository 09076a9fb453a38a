"""One place to report a run to: metrics.jsonl, TensorBoard and the progress bar, on rank 0 only."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from streamtrain.config.monitor import MonitorConfig
from streamtrain.monitor.metrics import MetricsLog, truncate_after
from streamtrain.monitor.progress import Progress
from streamtrain.monitor.tensorboard import EventWriter
from streamtrain.run_folder import METRICS_NAME, TENSORBOARD_NAME


class Monitor:
    """What a run shows of itself; every method does nothing off rank 0.

    Args:
        run_dir: the run folder; must exist.
        config: the ``monitor`` section.
        rank: of this process.
        steps: the last step of the run.
        start_step: the step of the checkpoint that the run goes on from, 0 for a fresh one; what was logged
            after it is cut from ``metrics.jsonl`` and hidden in TensorBoard.
    """

    def __init__(self, run_dir: Path, config: MonitorConfig, *, rank: int, steps: int, start_step: int) -> None:
        self._metrics: MetricsLog | None = None
        self._events: EventWriter | None = None
        self._progress: Progress | None = None
        if rank != 0:
            return
        truncate_after(run_dir / METRICS_NAME, start_step)
        self._metrics = MetricsLog(run_dir / METRICS_NAME)
        if config.tensorboard:
            self._events = EventWriter(run_dir / TENSORBOARD_NAME, start_step)
        if config.progress:
            self._progress = Progress(steps, start_step)

    def log(self, step: int, slot: int, scalars: Mapping[str, float]) -> None:
        """Report the completed ``step`` (from 1); ``slot`` is the next one, tags are TensorBoard's."""
        if self._metrics is not None:
            self._metrics.write(step, slot, scalars)
        if self._events is not None:
            self._events.scalars(step, scalars)
        if self._progress is not None:
            self._progress.update(step, scalars)

    def panel(self, step: int, image: np.ndarray, tag: str = "data/crops") -> None:
        """Show an image, uint8 [height, width, 3]."""
        if self._events is not None:
            self._events.image(tag, step, image)

    def text(self, tag: str, text: str) -> None:
        """Show Markdown text, such as the configuration."""
        if self._events is not None:
            self._events.text(tag, text)

    def warn(self, step: int, line: str) -> None:
        """Say what somebody should look at, on stderr and under ``warnings`` in TensorBoard."""
        if self._progress is not None:
            self._progress.say(f"warning: {line}")
        elif self._metrics is not None:
            print(f"warning: {line}", file=sys.stderr, flush=True)
        if self._events is not None:
            self._events.text("warnings", line, step)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        """Show how ``values`` (any shape) are distributed."""
        if self._events is not None:
            self._events.histogram(tag, step, values)

    def embedding(self, step: int, features: Tensor, labels: Sequence[str], thumbnails: Tensor) -> None:
        """Show features [N, D] in the projector, with a name and a thumbnail (uint8 [N, side, side, 3]) each."""
        if self._events is not None:
            self._events.embedding("features", step, features, labels, thumbnails)

    def close(self) -> None:
        for part in (self._metrics, self._events, self._progress):
            if part is not None:
                part.close()
