"""The checkpoint policy of a run: when to save which kind, the saved values, and the best checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streamtrain.checkpoint.retention import best_value
from streamtrain.checkpoint.writer import CheckpointPayload, CheckpointWriter
from streamtrain.config.run import RunConfig
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.diagnostics.non_finite import NonFiniteSteps
from streamtrain.engine.runtime import Runtime
from streamtrain.errors import CheckpointError
from streamtrain.reporting.sink import MetricsSink
from streamtrain.run.directory import CHECKPOINTS, SNAPSHOTS
from streamtrain.run.resume_policy import build_provenance
from streamtrain.run.signals import Requests
from streamtrain.training.build import Networks
from streamtrain.training.step import StepResult, is_due

# retries of the last checkpoint of a run, and the seconds before each
LAST_RETRIES, LAST_RETRY_SECONDS = 6, 5.0


def kinds_to_save(step: int, stop_request: int, applied: bool, is_best: bool, config: RunConfig) -> list[str]:
    """Return the kinds (checkpoints, snapshots) to save after ``step``.

    Args:
        stop_request: 0 or a request to save or stop.
        applied: whether the step changed the weights.
        is_best: whether the step's evaluation is the best so far.
    """
    kinds = []
    if stop_request or step == config.steps or (applied and (is_best or is_due(step, config.checkpoint_every))):
        kinds.append(CHECKPOINTS)
    if applied and is_due(step, config.snapshot_every):
        kinds.append(SNAPSHOTS)
    return kinds


class CheckpointPolicy:
    """Decides after each step what to save, and starts the save; every rank calls the methods."""

    def __init__(
        self, config: Config, runtime: Runtime, networks: Networks, loader: Loader, writer: CheckpointWriter,
        sink: MetricsSink, non_finite: NonFiniteSteps, requests: Requests,
    ) -> None:  # fmt: skip
        self._config, self._runtime, self._networks, self._loader = config, runtime, networks, loader
        self._writer, self._sink, self._non_finite, self._requests = writer, sink, non_finite, requests
        self._run_dir = Path(config.run.dir)
        self._provenance = build_provenance(config, runtime.description["dtype"])

    def after_step(self, result: StepResult, metrics: Mapping[str, float]) -> None:
        """Start the saves that are due after a step with these ``metrics``.

        Raises:
            DivergedError: if the weights to save are not finite.
        """
        step = result.step
        self._report_warnings(step)
        best = self._new_best(step, metrics)
        kinds = kinds_to_save(step, result.stop_request, result.applied, best is not None, self._config.run)
        if kinds or not result.applied:
            # if the run ends here, its error names the last checkpoint, which must be complete
            self.wait(step)
        if not kinds:
            return
        self._non_finite.check_weights(step, self._networks.student.is_finite(), self._runtime.device)
        self._save(step, result.next_slot, kinds, best)

    def _save(self, step: int, next_slot: int, kinds: list[str], best: Mapping[str, Any] | None) -> None:
        state = {"data": self._loader.state_dict(next_slot), "skipped_steps": self._non_finite.skipped}
        if CHECKPOINTS in kinds:
            self._requests.mark_save_started()
        payloads = build_payloads(kinds, self._provenance | state, self._networks)
        self._writer.save(step, payloads, self._requests.mark_save_finished, best)

    def retry(self, step: int, next_slot: int) -> None:
        """Retry the save of the last checkpoint, after ``step``, if it failed; every rank calls this."""
        for _ in range(LAST_RETRIES):
            if self._writer.failure is None:
                return
            # the same on all ranks
            time.sleep(LAST_RETRY_SECONDS)
            self._save(step, next_slot, [CHECKPOINTS], None)
            self._writer.wait()
            # the failure has been reported already
            self._writer.warnings()

    def wait(self, step: int) -> None:
        """Wait until no checkpoint is being written; report failed writes at ``step``."""
        self._writer.wait()
        self._report_warnings(step)

    def _report_warnings(self, step: int) -> None:
        for line in self._writer.warnings():
            self._sink.warn(step, line)

    def _new_best(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any] | None:
        """Return the step, metric and value of ``evaluation.best`` if it is the highest so far."""
        name = self._config.evaluation.best
        if name is None or f"eval/{name}" not in metrics:
            return None
        # a checkpoint counts as the best only once it is written
        self._writer.wait()
        value = metrics[f"eval/{name}"]
        # rank 0 decides: the last digits may differ between ranks, but all ranks save or none
        is_best = torch.tensor(float(self._runtime.rank == 0 and self._is_best(step, name, value)))
        is_best = is_best.to(self._runtime.device)
        dist.broadcast(is_best, 0)
        return {"step": step, "metric": name, "value": value} if is_best else None

    def _is_best(self, step: int, metric: str, value: float) -> bool:
        try:
            highest = best_value(self._run_dir, metric, step)
        except CheckpointError as error:
            self._sink.warn(step, f"the best checkpoint so far is unknown: {error}")
            return False
        return math.isfinite(value) and (highest is None or value > highest)


def build_payloads(kinds: list[str], state: dict[str, Any], networks: Networks) -> dict[str, CheckpointPayload]:
    """Return the payload of each kind: the whole state for a checkpoint, the teacher for a snapshot."""
    student = networks.student
    shapes = {name: fragment.shape for name, fragment in student.fragments.items()}
    teacher_shards = networks.teacher.shards()
    settings = {key: value for key, value in state.items() if key == "config"}
    shards = student.shards() | teacher_shards | networks.gram.shards() | networks.anchor.shards()
    payloads = {
        CHECKPOINTS: CheckpointPayload(shards, networks.target_maker.state_dict(), shapes, state),
        SNAPSHOTS: CheckpointPayload(teacher_shards, {}, shapes, settings),
    }
    return {kind: payloads[kind] for kind in kinds}
