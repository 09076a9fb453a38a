"""Steps with a non-finite loss or gradient: the engine skips them, this module records them and ends a diverged run.

anomalies/step-000000123.json   slots, losses and statistics of each micro-batch, and the suspect images
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamtrain.data.batch import Batch
from streamtrain.errors import DivergedError
from streamtrain.objective.targets import TeacherFeatures
from streamtrain.run.directory import saved_steps, step_folder

FOLDER_NAME = "anomalies"
logger = logging.getLogger(__name__)


class NonFiniteSteps:
    """Counts non-finite steps and writes a record of each.

    Attributes:
        skipped: number of such steps since step 0, across resumes.
    """

    def __init__(self, run_dir: Path, max_in_a_row: int, start_step: int, skipped: int) -> None:
        """``start_step``, ``skipped``: of the checkpoint the run resumes from."""
        self._run_dir, self._max_in_a_row = run_dir, max_in_a_row
        self._last_good, self._in_a_row = start_step, 0
        self.skipped = skipped

    def count(self, step: int, applied: bool) -> None:
        """Count the completed ``step`` (from 1)."""
        if applied:
            self._last_good, self._in_a_row = step, 0
        else:
            self._in_a_row += 1
            self.skipped += 1

    def record(
        self,
        step: int,
        batches: Sequence[Batch],
        features: Sequence[TeacherFeatures],
        losses: Sequence[Mapping[str, Tensor]],
        metrics: Mapping[str, float],
        describe_images: Callable[[Any], list[dict[str, Any]]],
    ) -> str:
        """Write the record of a non-finite step and return a warning; every rank calls this.

        Args:
            batches, features, losses: this rank's, one entry per micro-batch.
            metrics: of the step, by tag.
            describe_images: returns the shard and key of the image at each slot.
        """
        parts: list[dict[str, Any]] = []
        with _log_failure(step):
            parts = [_describe(*each) for each in zip(batches, features, losses, strict=True)]
        any_suspect: list[bool | None] = [None] * dist.get_world_size()
        dist.all_gather_object(any_suspect, any(part["in_doubt"] for part in parts))
        is_loss = any(any_suspect)
        if not is_loss:
            # gradients are reduced over the ranks before they are checked, so every rank is suspect
            parts = [{**part, "in_doubt": True} for part in parts]
        images: list[dict[str, Any]] = []
        with _log_failure(step):
            for batch, part in zip(batches, parts, strict=False):
                images += describe_images(batch.slots) if part["in_doubt"] else []
        ranks: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, {"rank": dist.get_rank(), "micro_batches": parts, "images": images})
        path = self._run_dir / FOLDER_NAME / f"step-{step:09d}.json"
        message = f"step {step} was skipped because {'a loss' if is_loss else 'the gradient'} is not finite"
        if dist.get_rank() > 0:
            return message
        document = {
            "step": step,
            "not_finite": "loss" if is_loss else "gradient",
            "in_a_row": self._in_a_row,
            "skipped": self.skipped,
            "scalars": {tag: _json_number(value) for tag, value in metrics.items()},
            "ranks": ranks,
        }
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            return f"{message}; {path} cannot be written ({error.strerror})"
        return f"{message}; see {path}"

    def raise_if_diverged(self, step: int) -> None:
        """Raise DivergedError if ``step`` completes ``run.max_bad_steps`` non-finite steps in a row."""
        if self._in_a_row < self._max_in_a_row:
            return
        raise DivergedError(
            f"{self._in_a_row} steps in a row, {step - self._in_a_row + 1} to {step}, had a non-finite loss or "
            f"gradient (run.max_bad_steps); {self._last_good_checkpoint()}. Inspect {self._run_dir / FOLDER_NAME}, "
            "then lower schedules.lr or optim.clip, or set engine.dtype=fp32"
        )

    def check_weights(self, step: int, is_finite: bool, device: torch.device) -> None:
        """Raise DivergedError on all ranks unless all weights to save after ``step`` are finite.

        Args:
            is_finite: whether this rank's weights are finite.
        """
        flag = torch.tensor([float(is_finite)], device=device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        if not flag.item():
            # an update with finite gradients keeps weights finite, so this is most likely a hardware fault
            raise DivergedError(
                f"the weights after step {step} are not finite and were not saved; {self._last_good_checkpoint()}. "
                "Run the same command again, on another machine if the error repeats"
            )

    def _last_good_checkpoint(self) -> str:
        steps = [step for step in saved_steps(self._run_dir) if step <= self._last_good]
        if not steps:
            return "there is no checkpoint"
        return f"the last good checkpoint is {step_folder(self._run_dir, steps[-1])}"


@contextmanager
def _log_failure(step: int) -> Iterator[None]:
    """Log an exception instead of raising it, because the other ranks wait in the next collective."""
    try:
        yield
    except Exception:
        logger.warning("the record of step %d is incomplete on this rank", step, exc_info=True)


def _describe(batch: Batch, features: TeacherFeatures, losses: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe a micro-batch; ``in_doubt`` if its losses or teacher features are not finite."""
    values = {name: _json_number(float(loss)) for name, loss in losses.items()}
    rows = {"global": features.global_features, "patch": features.patch_features}
    teacher = {name: _row_statistics(each) for name, each in rows.items() if each is not None}
    return {
        "slots": [int(batch.slots[0]), int(batch.slots[-1])],
        "losses": values,
        "global_crops": _crop_statistics(batch.global_crops),
        "local_crops": _crop_statistics(batch.local_crops),
        "masked_patches": int(batch.masks.grid_mask.sum()),
        "teacher_features": teacher,
        "in_doubt": any(isinstance(value, str) for value in values.values())
        or any(each["rows_not_finite"] for each in teacher.values()),
    }


def _crop_statistics(crops: Tensor) -> dict[str, Any]:
    """Return statistics of uint8 ``crops [N, height, width, 3]``; ``flat`` counts crops of a single colour."""
    if not crops.numel():
        return {"count": 0}
    values = crops.float()
    spread = values.flatten(1, 2).std(1, correction=0).amax(1)
    return {
        "count": len(crops), "size": crops.shape[1], "mean": float(values.mean()), "std": float(values.std()),
        "flat": int((spread == 0).sum()),
    }  # fmt: skip


def _row_statistics(features: Tensor) -> dict[str, Any]:
    norms = torch.linalg.vector_norm(features.float(), dim=1)
    finite = norms[norms.isfinite()]
    return {
        "rows": len(norms),
        "rows_not_finite": len(norms) - len(finite),
        "largest_norm": float(finite.max()) if len(finite) else None,
    }


def _json_number(value: float) -> float | str:
    """Return ``value`` if it is finite, else the string ``nan``, ``inf`` or ``-inf``."""
    return value if math.isfinite(value) else str(value)
