"""Experiment trackers besides TensorBoard. Their libraries are imported only if they are configured."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from streamtrain.config.monitor import MonitorConfig
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError
from streamtrain.reporting.tensorboard import changed_hyperparameters

_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_BINS = 64  # of a histogram


class Tracker(Protocol):
    """An output for finite scalars by tag, images uint8 [height, width, 3], finite fp32 values [n] and Markdown.

    A tracker ignores kinds of data that it cannot show.
    """

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def image(self, tag: str, step: int, image: np.ndarray) -> None: ...

    def histogram(self, tag: str, step: int, values: np.ndarray) -> None: ...

    def text(self, tag: str, text: str, step: int) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: MonitorConfig) -> None:
    """Raise ConfigError unless the libraries of ``monitor.trackers`` are installed."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise ConfigError(f"monitor.trackers: {name} is not installed; pip install {_PACKAGES[name]}")


def tracker_openers(config: Config, run_dir: Path) -> dict[str, Callable[[], Tracker]]:
    """Return by name how to open the trackers of ``monitor.trackers``; a resumed run resumes there too."""
    makers: dict[str, Any] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
    return {name: partial(makers[name], config, run_dir) for name in config.monitor.trackers}


class WandbTracker:
    """Weights & Biases, configured by its own environment variables."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._wandb = importlib.import_module("wandb")
        name = run_dir.resolve()
        self._run = self._wandb.init(
            project=config.monitor.project, name=name.name, dir=str(run_dir), config=changed_hyperparameters(config),
            id=hashlib.sha256(str(name).encode()).hexdigest()[:16], resume="allow",
        )  # fmt: skip
        # wandb's own step never decreases, and would drop the steps repeated after a crash
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
    """MLflow, configured by its own environment variables; it has no histograms."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(config.monitor.project)
        run_id = run_dir / "mlflow.run"
        if run_id.exists():
            self._mlflow.start_run(run_id=run_id.read_text().strip())
        else:
            run = self._mlflow.start_run(run_name=run_dir.resolve().name)
            run_id.write_text(f"{run.info.run_id}\n")
            self._mlflow.log_params(changed_hyperparameters(config))

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
