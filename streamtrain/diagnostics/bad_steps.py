"""Steps whose loss or gradient is not finite: left out by the engine, described here, and too many in a row end a run.

    anomalies/step-000000123.json   one of them: each micro-batch's slots, losses and statistics, the images in doubt
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamtrain.data.batch import Batch
from streamtrain.data.loader import Loader
from streamtrain.errors import DivergedError
from streamtrain.objective.targets import TeacherFeatures
from streamtrain.run.directory import saved_steps, step_folder

FOLDER_NAME = "anomalies"


@dataclass(frozen=True)
class Evidence:
    """What this rank has of a step, one entry a micro-batch."""

    batches: Sequence[Batch]
    features: Sequence[TeacherFeatures]
    losses: Sequence[Mapping[str, Tensor]]


class BadSteps:
    """Counts them and writes them down.

    Attributes:
        skipped: how many there were since the run began, or since the run it goes on from did.
    """

    def __init__(self, run_dir: Path, most_in_a_row: int, start_step: int, skipped: int) -> None:
        self._run_dir, self._most_in_a_row = run_dir, most_in_a_row
        self._last_good, self._in_a_row = start_step, 0
        self.skipped = skipped

    def count(self, step: int, applied: bool) -> None:
        """Take note of the completed ``step`` (from 1)."""
        if applied:
            self._last_good, self._in_a_row = step, 0
        else:
            self._in_a_row += 1
            self.skipped += 1

    def record(self, step: int, evidence: Evidence, scalars: Mapping[str, float], loader: Loader) -> str:
        """Write the step's file, and return what to tell of it; every rank calls this."""
        own = _describe(evidence)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        shown: list[bool | None] = [None] * world_size
        dist.all_gather_object(shown, any(part["in_doubt"] for part in own))
        if not any(shown):
            # the gradients of all ranks are one by the time anybody could tell whose was at fault
            own = [{**part, "in_doubt": True} for part in own]
        doubtful = [batch.slots for batch, part in zip(evidence.batches, own, strict=True) if part["in_doubt"]]
        images = [image for slots in doubtful for image in loader.describe_samples(slots)]
        everyone: list[dict[str, Any] | None] = [None] * world_size
        dist.all_gather_object(everyone, {"rank": rank, "micro_batches": own, "images": images})
        path = self._run_dir / FOLDER_NAME / f"step-{step:09d}.json"
        told = f"step {step} was left out, since {'a loss' if any(shown) else 'the gradient'} is not finite"
        if rank > 0:
            return told
        document = {
            "step": step,
            "not_finite": "loss" if any(shown) else "gradient",
            "in_a_row": self._in_a_row,
            "skipped": self.skipped,
            "scalars": {tag: _number(value) for tag, value in scalars.items()},
            "ranks": everyone,
        }
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            return f"{told}; {path} cannot be written ({error.strerror})"
        return f"{told}; see {path}"

    def check(self, step: int) -> None:
        """Whether to go on after ``step``.

        Raises:
            DivergedError: too many steps in a row were bad; names the last good checkpoint.
        """
        if self._in_a_row < self._most_in_a_row:
            return
        raise DivergedError(
            f"{self._in_a_row} steps in a row, {step - self._in_a_row + 1} to {step}, had a loss or gradient that is "
            f"not finite (run.max_bad_steps); {self._last_good_text()}. Look into {self._run_dir / FOLDER_NAME}, then "
            "lower schedules.lr or optim.clip, or set engine.dtype=fp32"
        )

    def check_weights(self, step: int, finite: bool, device: torch.device) -> None:
        """Whether the weights after ``step`` may be saved; ``finite`` says so of this rank's. Every rank calls this.

        Raises:
            DivergedError: some rank's are not finite; names the last good checkpoint.
        """
        flag = torch.tensor([float(finite)], device=device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        if not flag.item():
            # no update with finite gradients can lead there, so that this is most likely the work of a machine
            raise DivergedError(
                f"the weights after step {step} hold numbers that are not finite, and are not saved; "
                f"{self._last_good_text()}. Start again, on another machine if it comes back"
            )

    def _last_good_text(self) -> str:
        """Which checkpoint was saved last before the steps began to be bad."""
        steps = [step for step in saved_steps(self._run_dir) if step <= self._last_good]
        if not steps:
            return "there is no checkpoint"
        return f"the last good checkpoint is {step_folder(self._run_dir, steps[-1])}"


def _describe(evidence: Evidence) -> list[dict[str, Any]]:
    """Each micro-batch of this rank, for people."""
    parts = []
    for batch, features, losses in zip(evidence.batches, evidence.features, evidence.losses, strict=True):
        values = {name: _number(float(loss)) for name, loss in losses.items()}
        rows = {"global": features.global_features, "patch": features.patch_features}
        teacher = {name: _rows(found) for name, found in rows.items() if found is not None}
        parts.append(
            {
                "slots": [int(batch.slots[0]), int(batch.slots[-1])],
                "losses": values,
                "global_crops": _pixels(batch.global_crops),
                "local_crops": _pixels(batch.local_crops),
                "masked_patches": int(batch.masks.grid_mask.sum()),
                "teacher_features": teacher,
                "in_doubt": any(isinstance(value, str) for value in values.values())
                or any(found["rows_not_finite"] for found in teacher.values()),
            }
        )
    return parts


def _pixels(crops: Tensor) -> dict[str, Any]:
    """Statistics of uint8 ``crops [N, height, width, 3]``; ``flat`` counts those of one colour."""
    if not crops.numel():
        return {"count": 0}
    values = crops.float()
    spread = values.flatten(1, 2).std(1, correction=0).amax(1)
    return {
        "count": len(crops), "size": crops.shape[1], "mean": float(values.mean()), "std": float(values.std()),
        "flat": int((spread == 0).sum()),
    }  # fmt: skip


def _rows(features: Tensor) -> dict[str, Any]:
    """Statistics of ``features [N, d]``."""
    norms = torch.linalg.vector_norm(features.float(), dim=1)
    finite = norms[norms.isfinite()]
    return {
        "rows": len(norms),
        "rows_not_finite": len(norms) - len(finite),
        "largest_norm": float(finite.max()) if len(finite) else None,
    }


def _number(value: float) -> float | str:
    """As it is where JSON can hold it, else ``nan``, ``inf`` or ``-inf``."""
    return value if math.isfinite(value) else str(value)
