"""Time that training waits for a checkpoint, written in the background and in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.short_runs import run_training
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError

STALL, SAVE = "speed/checkpoint_stall_seconds", "speed/checkpoint_seconds"


def run(config: Config, ranks: int, steps: int, scratch: Path | None) -> dict[str, Any]:
    """Save once in the middle of ``2 * steps`` real training steps, in both ways.

    Args:
        steps: steps before and after the save; a background save should finish within the latter.
        scratch: folder on the disk to measure.

    Raises:
        StreamtrainError: a run failed or saved nothing.
    """
    results: dict[str, dict[str, float]] = {}
    for mode, background in (("waiting", False), ("background", True)):
        keys = {"steps": 2 * steps, "checkpoint_every": steps, "snapshot_every": 0, "save_in_background": background}
        records, _ = run_training(config, ranks, keys, scratch)
        if not any(record.get(STALL) for record in records):
            raise StreamtrainError("nothing was saved: give --scratch a folder on a disk with room for two checkpoints")
        results[mode] = {tag: sum(record.get(tag, 0.0) for record in records) for tag in (STALL, SAVE)}
        results[mode]["step"] = min(record["speed/step_seconds"] for record in records)
    waiting, background_save = results["waiting"], results["background"]
    return {
        "ratio": background_save[STALL] / waiting[STALL],
        "background_stall_seconds": background_save[STALL],
        "waiting_stall_seconds": waiting[STALL],
        # 0 if the save did not finish within the steps
        "background_save_seconds": background_save[SAVE],
        "step_seconds": waiting["step"],
    }
