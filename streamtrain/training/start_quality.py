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
    """Compares each evaluation with the start, as ``evaluation.stop_if_below`` configures it."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        has_reference = config.evaluation.reference is not None
        self._tags = (f"reference/{METRIC}", f"drift/reference/{METRIC}") if has_reference else (
            f"eval/{METRIC}", f"drift/{METRIC}"
        )  # fmt: skip
        # of the last evaluation
        self.drift: str | None = None
        self._fall = ""

    def stop_code(self, metrics: Mapping[str, float]) -> int:
        """Return ``EXIT_DRIFTED`` on all ranks if these metrics of a step are too low, else 0; every rank calls this.

        Rank 0 decides, because the last digits may differ between ranks.
        """
        self.drift = describe_drift(metrics) or self.drift
        share = self._config.evaluation.stop_if_below
        if share is None or not all(tag in metrics for tag in self._tags):
            return 0
        value, change = (metrics[tag] for tag in self._tags)
        start = value - change
        is_below = torch.tensor(float(value < share * start), device=self._runtime.device)
        dist.broadcast(is_below, 0)
        of_reference = " of the reference" if self._config.evaluation.reference is not None else ""
        self._fall = (
            f"kNN{of_reference} is {value:.1%}, less than {share:.0%} of the {start:.1%} at the start "
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
        return f"stopped at step {step}, {status}: {self._fall}; best checkpoint: {name}"
