"""The metrics sink of a run: metrics.jsonl, TensorBoard, other trackers and the progress bar, on rank 0."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.errors import printable, printable_lines
from streamtrain.config.tree import Config
from streamtrain.ops.collectives import FailedOnOtherRank
from streamtrain.reporting.metrics import MetricsLog
from streamtrain.reporting.tensorboard import EventWriter
from streamtrain.reporting.trackers import Tracker, tracker_openers
from streamtrain.reporting.usage import Stopwatch
from streamtrain.run.directory import METRICS_NAME, TENSORBOARD_NAME
from streamtrain.run.progress import Evaluations, TrainingProgress

# a failure that takes longer counts as slow
SLOW_SECONDS = 0.5
logger = logging.getLogger(__name__)


class BestEffort:
    """Runs optional work of this rank: an exception is logged and does not end the run.

    The same exception from the same line is logged once, with its traceback.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_failed = False  # the latest call
        self._logged: set[tuple[object, ...]] = set()

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of ``work``; None if it failed."""
        self.has_failed = True
        try:
            result = work(*arguments)
            self.has_failed = False
            return result
        except FailedOnOtherRank:
            return None
        except Exception as error:
            self._log(error)
            # its frames hold tensors
            traceback.clear_frames(error.__traceback__)
            is_out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if is_out_of_memory:
            torch.cuda.empty_cache()
        return None

    def _log(self, error: Exception) -> None:
        places = traceback.extract_tb(error.__traceback__)
        fault = (type(error), places[-1].filename, places[-1].lineno)
        if fault not in self._logged:
            self._logged.add(fault)
            logger.warning("%s failed and is left out; training continues", self.name, exc_info=error)


class _Output:
    """A tracker, opened at its first use. After a slow failure it is skipped for a while."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker]) -> None:
        self._open, self._guard = open_tracker, BestEffort(name)
        self._tracker: Tracker | None = None
        self._next_attempt = 0.0

    @property
    def is_ready(self) -> bool:
        return time.monotonic() >= self._next_attempt

    def call(self, method: str, *arguments: object) -> None:
        """Call a method of the tracker, unless a slow failure was recent."""
        if not self.is_ready:
            return
        began = time.monotonic()
        self._guard.run(self._call, method, arguments)
        seconds = time.monotonic() - began
        if self._guard.has_failed and seconds > SLOW_SECONDS:
            # a server that takes long to fail must not slow down training by more than 5 %
            self._next_attempt = time.monotonic() + 20 * seconds

    def close(self) -> None:
        if self._tracker is not None:
            self._guard.run(self._tracker.close)

    def _call(self, method: str, arguments: tuple[object, ...]) -> None:
        if self._tracker is None:
            self._tracker = self._open()
        # only TensorBoard shows features
        getattr(self._tracker, method, lambda *_: None)(*arguments)


class MetricsSink:
    """Sends a run's reports to all outputs; on ranks other than 0 every method does nothing."""

    def __init__(self, run_dir: Path, config: Config, *, rank: int, start_step: int) -> None:
        """Remove steps after ``start_step`` from ``metrics.jsonl``, and hide them in TensorBoard."""
        self._config, self._run_dir, self._start_step = config, run_dir, start_step
        self._metrics: MetricsLog | None = None
        self._progress: TrainingProgress | None = None
        self._progress_guard = BestEffort("the progress bar")
        self._outputs: list[_Output] = []
        # times all reporting; the observers that draw for the sink add their own time
        self.stopwatch = Stopwatch()
        if rank != 0:
            return
        self._metrics = MetricsLog(run_dir / METRICS_NAME, start_step)
        openers = tracker_openers(config, run_dir)
        if config.monitor.tensorboard:
            openers = {"TensorBoard": partial(EventWriter, run_dir / TENSORBOARD_NAME, start_step, config)} | openers
        self._outputs = [_Output(name, open_tracker) for name, open_tracker in openers.items()]

    def start_progress(self) -> None:
        """Show progress, with times from now on."""
        if self._metrics is None or not self._config.monitor.progress:
            return
        evaluations = Evaluations(self._config.evaluation.best)
        if self._start_step:
            evaluations.read(self._run_dir / METRICS_NAME, self._start_step)
        self._progress = TrainingProgress(self._config.run.steps, self._start_step, evaluations=evaluations)

    @property
    def has_trackers(self) -> bool:
        """Whether any output shows images, histograms and text."""
        return any(output.is_ready for output in self._outputs)

    def log(self, step: int, slot: int, scalars: Mapping[str, float]) -> None:
        """Report the metrics of the completed ``step`` by TensorBoard tag; ``slot``: the first of the next step."""
        with self.stopwatch:
            if self._metrics is not None:
                self._metrics.write(step, slot, scalars)
            finite = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
            self._call_trackers("scalars", step, finite)
            if self._progress is not None:
                self._progress_guard.run(self._progress.update, step, scalars)

    def log_before_training(self, scalars: Mapping[str, float]) -> None:
        """Report metrics of the start to the trackers; ``metrics.jsonl`` begins with the first completed step."""
        with self.stopwatch:
            finite = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
            self._call_trackers("scalars", self._start_step, finite)

    def image(self, step: int, image: np.ndarray, tag: str = "data/crops") -> None:
        """Show an image, uint8 [height, width, 3]."""
        self._call_trackers("image", tag, step, image)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show Markdown text, such as the configuration."""
        self._call_trackers("text", printable(tag), printable_lines(text), step)

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
        self._call_trackers("embedding", step, features.float().cpu().numpy(), labels, thumbnails.numpy())

    def close(self) -> None:
        for output in self._outputs:
            output.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._progress is not None:
            self._progress_guard.run(self._progress.close)

    def _call_trackers(self, method: str, *arguments: object) -> None:
        """Call a method of every tracker; an unreachable server does not end the training."""
        for output in self._outputs:
            output.call(method, *arguments)
