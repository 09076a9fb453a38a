"""The metrics sink of a run: metrics.jsonl, TensorBoard, other trackers and the progress bar, on rank 0."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from streamtrain.config.tree import Config
from streamtrain.reporting.metrics import MetricsLog, truncate_after
from streamtrain.reporting.tensorboard import EventWriter
from streamtrain.reporting.trackers import Tracker, open_trackers
from streamtrain.reporting.usage import Stopwatch
from streamtrain.run.directory import METRICS_NAME, TENSORBOARD_NAME
from streamtrain.run.progress import TrainingProgress

logger = logging.getLogger(__name__)


class BestEffort:
    """Runs optional work of this rank: the first exception is logged with its traceback and disables the work."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_enabled = True

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of ``work``; None if it failed now or earlier."""
        if not self.is_enabled:
            return None
        try:
            return work(*arguments)
        except Exception as error:
            self.disable(error=error)
            return None

    def disable(self, where: str = "", error: Exception | None = None) -> None:
        """Disable the work and log that it failed ``where``, with the traceback of ``error``."""
        self.is_enabled = False
        where = f" {where}" if where else ""
        logger.warning("%s failed%s and is disabled for the rest of this run", self.name, where, exc_info=error)


class MetricsSink:
    """Sends a run's reports to all outputs; on ranks other than 0 every method does nothing."""

    def __init__(self, run_dir: Path, config: Config, *, rank: int, start_step: int) -> None:
        """Remove steps after ``start_step`` from ``metrics.jsonl``, and hide them in TensorBoard."""
        self._metrics: MetricsLog | None = None
        self._progress: TrainingProgress | None = None
        self._trackers: list[tuple[Tracker, BestEffort]] = []
        # times all reporting; the observers that draw for the sink add their own time
        self.stopwatch = Stopwatch()
        if rank != 0:
            return
        truncate_after(run_dir / METRICS_NAME, start_step)
        self._metrics = MetricsLog(run_dir / METRICS_NAME)
        trackers: list[Tracker] = []
        if config.monitor.tensorboard:
            trackers.append(EventWriter(run_dir / TENSORBOARD_NAME, start_step, config))
        trackers += open_trackers(config, run_dir)
        self._trackers = [(tracker, BestEffort(type(tracker).__name__)) for tracker in trackers]
        if config.monitor.progress:
            self._progress = TrainingProgress(config.run.steps, start_step)

    @property
    def has_trackers(self) -> bool:
        """Whether any output shows images, histograms and text."""
        return any(guard.is_enabled for _, guard in self._trackers)

    def log(self, step: int, slot: int, scalars: Mapping[str, float]) -> None:
        """Report the metrics of the completed ``step`` by TensorBoard tag; ``slot``: the first of the next step."""
        with self.stopwatch:
            if self._metrics is not None:
                self._metrics.write(step, slot, scalars)
            finite = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
            self._call_trackers("scalars", step, finite)
            if self._progress is not None:
                self._progress.update(step, scalars)

    def image(self, step: int, image: np.ndarray, tag: str = "data/crops") -> None:
        """Show an image, uint8 [height, width, 3]."""
        self._call_trackers("image", tag, step, image)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show Markdown text, such as the configuration."""
        self._call_trackers("text", tag, text, step)

    def warn(self, step: int, line: str) -> None:
        """Log a warning and add it to the ``warnings`` text of TensorBoard."""
        if self._metrics is not None:
            logger.warning(line)
            self.text("warnings", line, step)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        """Show the distribution of the finite ``values`` (any shape)."""
        if not self.has_trackers:
            return
        flat = values.detach().flatten().float().cpu().numpy()
        flat = flat[np.isfinite(flat)]
        if len(flat):
            self._call_trackers("histogram", tag, step, flat)

    def embedding(self, step: int, features: Tensor, labels: Sequence[str], thumbnails: Tensor) -> None:
        """Show features [N, D] with labels and thumbnails uint8 [N, side, side, 3] in TensorBoard's projector."""
        for tracker, _ in self._trackers:
            if isinstance(tracker, EventWriter):
                tracker.embedding(step, features.float().cpu().numpy(), labels, thumbnails.numpy())

    def close(self) -> None:
        self._call_trackers("close")
        for part in (self._metrics, self._progress):
            if part is not None:
                part.close()

    def _call_trackers(self, method: str, *arguments: object) -> None:
        """Call a method of every tracker; an unreachable server or a full disk does not end the training."""
        for tracker, guard in self._trackers:
            guard.run(getattr(tracker, method), *arguments)
