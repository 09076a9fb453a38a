"""Other places to report to, by the protocol of TensorBoard's writer. Their libraries are loaded when asked for."""

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
from streamtrain.reporting.layout import hyperparameters

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
# how many values of a histogram go over the network
_BINS = 64


class Tracker(Protocol):
    """Takes what a run reports; a kind of thing that a place cannot show is left out there."""

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Finite values by tag."""

    def image(self, tag: str, step: int, image: np.ndarray) -> None:
        """``image``: uint8 [height, width, 3]."""

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None:
        """``values``: finite, fp32 [n]."""

    def text(self, tag: str, text: str, step: int) -> None:
        """``text``: Markdown."""

    def close(self) -> None: ...


def check_trackers(config: MonitorConfig) -> None:
    """
    Raises:
        ConfigError: if the library of one is not installed.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"monitor.trackers: {name} is not installed; pip install {_PACKAGES[name]}")


def open_trackers(config: Config, run_dir: Path) -> list[Tracker]:
    """Those of ``monitor.trackers``; a run that goes on is gone on with there."""
    makers: dict[str, Any] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
    return [makers[name](config, run_dir) for name in config.monitor.trackers]


class WandbTracker:
    """Weights & Biases; where to, and whether at all, its own environment variables say."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._wandb = importlib.import_module("wandb")
        name = run_dir.resolve()
        self._run = self._wandb.init(
            project=config.monitor.project, name=name.name, dir=str(run_dir), config=hyperparameters(config),
            id=hashlib.sha256(str(name).encode()).hexdigest()[:16], resume="allow",
        )  # fmt: skip
        # its own count only ever rises, and would leave out the steps that are done again after a crash
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
    """MLflow; its own environment variables say which server. It has no histograms."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(config.monitor.project)
        known = run_dir / "mlflow.run"
        if known.exists():
            self._mlflow.start_run(run_id=known.read_text().strip())
        else:
            run = self._mlflow.start_run(run_name=run_dir.resolve().name)
            known.write_text(f"{run.info.run_id}\n")
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
