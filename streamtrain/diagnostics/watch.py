"""What a run keeps an eye on after each step: numbers that are not finite, sudden rises of the loss, collapse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.diagnostics.bad_steps import BadSteps, Evidence
from streamtrain.diagnostics.collapse import Collapse
from streamtrain.diagnostics.spikes import Spikes
from streamtrain.objective.targets import Targets


class Watch:
    """Every rank has one; they see the same figures and come to the same conclusions."""

    def __init__(self, config: Config, start_step: int, skipped_steps: int) -> None:
        """``start_step``, ``skipped_steps``: of the checkpoint that the run goes on from."""
        self.bad_steps = BadSteps(Path(config.run.dir), config.run.max_bad_steps, start_step, skipped_steps)
        self._spikes = Spikes(config.monitor.spike_window, config.monitor.spike_score)
        self._score: float | None = None
        self._collapse = Collapse(config.monitor.collapse, config.crops.global_count, config.objective.chunk_bytes)

    def look(self, step: int, targets: Sequence[Targets]) -> dict[str, float]:
        """What is to be logged of the teacher that made the targets of ``step`` (from 1); before it is updated."""
        return self._collapse.scalars(step, targets)

    def scalars(self, step: int, applied: bool, loss: float) -> dict[str, float]:
        """What is to be logged of the completed ``step`` (from 1), whose mean ``loss`` this is."""
        self.bad_steps.count(step, applied)
        self._score = self._spikes.score(loss)
        found = {"optim/skipped_steps": float(self.bad_steps.skipped)}
        return found if self._score is None else {**found, "watch/loss_z": self._score}

    def warnings(
        self, step: int, applied: bool, scalars: Mapping[str, float], evidence: Evidence, loader: Loader
    ) -> Iterator[str]:
        """What somebody should know of ``step``, whose ``scalars`` those are; to be read to the end on every rank."""
        if not applied:
            yield self.bad_steps.record(step, evidence, scalars, loader)
        if line := self._spikes.warning(step, scalars["loss/total"], self._score):
            first, last = evidence.batches[0].slots[0], evidence.batches[-1].slots[-1]
            yield f"{line} (slots {first} to {last} on rank 0)"
        yield from self._collapse.warnings(step)
