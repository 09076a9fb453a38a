"""Experiment trackers besides TensorBoard. Their libraries are imported only if they are configured."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from streamtrain.config.monitor import MonitorConfig
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError
from streamtrain.reporting.tensorboard import hyperparameters

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_BINS = 64  # of a histogram


class Tracker(Protocol):
    """The interface of TensorBoard's writer; a tracker ignores kinds of data it cannot show."""

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Report finite values by tag."""

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        """Show ``image``, uint8 [height, width, 3]."""

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        """Show the histogram of ``values``, finite fp32 [n]."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Show Markdown ``text``."""

    def close(self) -> None: ...


def check_trackers(config: MonitorConfig) -> None:
    """Check that the libraries of ``monitor.trackers`` are installed.

    Raises:
        ConfigError: if one is missing.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"monitor.trackers: {name} is not installed; pip install {_PACKAGES[name]}")


def open_trackers(config: Config, run_dir: Path) -> list[Tracker]:
    """Open the trackers of ``monitor.trackers``; a resumed run is resumed there as well."""
    makers: dict[str, Any] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
    return [makers[name](config, run_dir) for name in config.monitor.trackers]


class WandbTracker:
    """Weights & Biases, configured by its own environment variables."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._wandb = importlib.import_module("wandb")
        name = run_dir.resolve()
        self._run = self._wandb.init(
            project=config.monitor.project, name=name.name, dir=str(run_dir), config=hyperparameters(config),
            id=hashlib.sha256(str(name).encode()).hexdigest()[:16], resume="allow",
        )  # fmt: skip
        # wandb's own step only rises and would drop the steps repeated after a crash
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        self._run.log({"step": step, tag: self._wandb.Image(image)})

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        histogram = self._wandb.Histogram(np_histogram=np.histogram(values, _BINS))
        self._run.log({"step": step, tag: histogram})

    def text(self, tag: str, text: str, step: int) -> None:
        self._run.summary[tag] = text

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """MLflow, whose environment variables set the server. It has no histograms."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(config.monitor.project)
        run_id = run_dir / "mlflow.run"
        if run_id.exists():
            self._mlflow.start_run(run_id=run_id.read_text().strip())
        else:
            run = self._mlflow.start_run(run_name=run_dir.resolve().name)
            run_id.write_text(f"{run.info.run_id}\n")
            self._mlflow.log_params(hyperparameters(config))

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(scalars), step=step)

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        self._mlflow.log_image(image, artifact_file=f"{tag}/{step:09d}.png")

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        pass

    def text(self, tag: str, text: str, step: int) -> None:
        self._mlflow.log_text(text, f"{tag}.md")

    def close(self) -> None:
        self._mlflow.end_run()
