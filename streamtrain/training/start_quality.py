"""Stops a run whose network has become worse than the network that it started from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from streamtrain.checkpoint.retention import read_best
from streamtrain.config.tree import Config
from streamtrain.engine.runtime import Runtime
from streamtrain.run.directory import step_folder
from streamtrain.run.messages import describe_drift
from streamtrain.run.signals import EXIT_DRIFTED

METRIC = "knn_20"


class StartQuality:
    """Compares each evaluation with the start, as ``evaluation.stop_if_below`` configures it.

    Attributes:
        drift: text of the last evaluation from ``describe_drift``; None without one.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        if config.evaluation.reference is None:
            self._name, self._tag, self._drift_tag = "kNN", f"eval/{METRIC}", f"drift/{METRIC}"
        else:
            self._name = "kNN of the reference"
            self._tag, self._drift_tag = f"reference/{METRIC}", f"drift/reference/{METRIC}"
        self.drift: str | None = None
        self._reason = ""

    def stop_code(self, metrics: Mapping[str, float]) -> int:
        """Return ``EXIT_DRIFTED`` on all ranks if these metrics of a step are too low, else 0; every rank calls this.

        Rank 0 decides, because the last digits may differ between ranks.
        """
        self.drift = describe_drift(metrics) or self.drift
        share = self._config.evaluation.stop_if_below
        if share is None or self._tag not in metrics or self._drift_tag not in metrics:
            return 0
        value = metrics[self._tag]
        start = value - metrics[self._drift_tag]
        is_below = torch.tensor(float(value < share * start), device=self._runtime.device)
        dist.broadcast(is_below, 0)
        self._reason = (
            f"{self._name} is {value:.1%}, less than {share:.0%} of the {start:.1%} at the start "
            "(evaluation.stop_if_below)"
        )
        return EXIT_DRIFTED if is_below else 0

    def message(self, step: int, status: str) -> str:
        """Return the last line of a run that was stopped after ``step``; ``status``: of its checkpoint."""
        run_dir = Path(self._config.run.dir)
        best = read_best(run_dir)
        name = "none was recorded (evaluation.best)"
        if best is not None:
            this = ", this one" if best["step"] == step else ""
            name = f"{step_folder(run_dir, best['step'])} ({best['metric']} {best['value']:.1%}{this})"
        return f"stopped at step {step}, {status}: {self._reason}; best checkpoint: {name}"
