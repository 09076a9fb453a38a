"""How long a checkpoint holds up training: written beside it, and with training waiting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.training import trained
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError

STALL, TOOK = "speed/checkpoint_stall_seconds", "speed/checkpoint_seconds"


def run(config: Config, ranks: int, steps: int, scratch: Path | None) -> dict[str, Any]:
    """Save once in the middle of a real training of ``2 * steps`` steps, in both ways.

    Args:
        steps: after the save, within which one beside the training should end.
        scratch: a folder on the disk that is to be measured.

    Raises:
        StreamtrainError: if a run fails, or saves nothing.
    """
    found: dict[str, dict[str, float]] = {}
    for way, background in (("waiting", False), ("background", True)):
        keys = {"steps": 2 * steps, "checkpoint_every": steps, "snapshot_every": 0, "save_in_background": background}
        records, _ = trained(config, ranks, keys, scratch)
        if not any(record.get(STALL) for record in records):
            raise StreamtrainError("nothing was saved: give --scratch a folder on a disk with room for two checkpoints")
        found[way] = {tag: sum(record.get(tag, 0.0) for record in records) for tag in (STALL, TOOK)}
        found[way]["step"] = min(record["speed/step_seconds"] for record in records)
    waiting, background_found = found["waiting"], found["background"]
    return {
        "ratio": background_found[STALL] / waiting[STALL],
        "background_stall_seconds": background_found[STALL],
        "waiting_stall_seconds": waiting[STALL],
        # 0 where it did not end within the steps
        "background_save_seconds": background_found[TOOK],
        "step_seconds": waiting["step"],
    }
