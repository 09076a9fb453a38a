"""One place to report a run to: metrics.jsonl, TensorBoard, other trackers and the progress bar, on rank 0 only."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from streamtrain.config.tree import Config
from streamtrain.reporting.metrics import MetricsLog, truncate_after
from streamtrain.reporting.progress import Progress
from streamtrain.reporting.projector import write_features
from streamtrain.reporting.tensorboard import EventWriter
from streamtrain.reporting.trackers import Tracker, open_trackers
from streamtrain.run.directory import METRICS_NAME, TENSORBOARD_NAME


class Monitor:
    """What a run shows of itself; every method does nothing off rank 0.

    Args:
        run_dir: the run folder; must exist.
        config: of the run.
        rank: of this process.
        start_step: the step of the checkpoint that the run goes on from, 0 for a fresh one; what was logged
            after it is cut from ``metrics.jsonl`` and hidden in TensorBoard.
    """

    def __init__(self, run_dir: Path, config: Config, *, rank: int, start_step: int) -> None:
        self._metrics: MetricsLog | None = None
        self._progress: Progress | None = None
        self._trackers: list[Tracker] = []
        self._projector: Path | None = None
        if rank != 0:
            return
        truncate_after(run_dir / METRICS_NAME, start_step)
        self._metrics = MetricsLog(run_dir / METRICS_NAME)
        if config.monitor.tensorboard:
            self._projector = run_dir / TENSORBOARD_NAME
            self._trackers.append(EventWriter(self._projector, start_step, config))
        self._trackers += open_trackers(config, run_dir)
        if config.monitor.progress:
            self._progress = Progress(config.run.steps, start_step)

    @property
    def shows(self) -> bool:
        """Whether pictures and the like are seen by anybody."""
        return bool(self._trackers)

    def log(self, step: int, slot: int, scalars: Mapping[str, float]) -> None:
        """Report the completed ``step`` (from 1); ``slot`` is the next one, tags are TensorBoard's."""
        if self._metrics is not None:
            self._metrics.write(step, slot, scalars)
        finite = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
        self._tell("scalars", step, finite)
        if self._progress is not None:
            self._progress.update(step, scalars)

    def panel(self, step: int, image: np.ndarray, tag: str = "data/crops") -> None:
        """Show an image, uint8 [height, width, 3]."""
        self._tell("image", tag, step, image)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Show Markdown text, such as the configuration."""
        self._tell("text", tag, text, step)

    def warn(self, step: int, line: str) -> None:
        """Say what somebody should look at, on stderr and under ``warnings`` in TensorBoard."""
        self._say(line)
        self.text("warnings", line, step)

    def _tell(self, method: str, *arguments: object) -> None:
        """Call a method of every tracker; one that fails is told about and left alone from then on."""
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                # a server that is gone, or a full disk, must not end the training
                self._trackers.remove(tracker)
                self._say(f"{type(tracker).__name__} gets nothing more, since it has failed: {error}")

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.say(f"warning: {line}")
        elif self._metrics is not None:
            print(f"warning: {line}", file=sys.stderr, flush=True)

    def histogram(self, step: int, tag: str, values: Tensor) -> None:
        """Show how ``values`` (any shape) are distributed; those that are not finite are left out."""
        if not self._trackers:
            return
        flat = values.detach().flatten().float().cpu().numpy()
        flat = flat[np.isfinite(flat)]
        if len(flat):
            self._tell("histogram", tag, step, flat)

    def embedding(self, step: int, features: Tensor, labels: Sequence[str], thumbnails: Tensor) -> None:
        """Show features [N, D] in TensorBoard's projector, with a name and a thumbnail (uint8 [N, s, s, 3]) each."""
        if self._projector is None:
            return
        try:
            write_features(self._projector, step, features.float().cpu().numpy(), labels, thumbnails.numpy())
        except OSError as error:
            self.warn(step, f"the projector's files could not be written: {error}")

    def close(self) -> None:
        self._tell("close")
        for part in (self._metrics, self._progress):
            if part is not None:
                part.close()
