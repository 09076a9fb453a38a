"""Planned and measured peak memory of each rank over a few real training steps, by part."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.short_runs import run_training
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.planning.images import configured_images
from streamtrain.planning.memory import plan
from streamtrain.planning.parts import STEP_PHASES


def run(config: Config, ranks: int, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps on ``ranks`` ranks of this machine, without checkpoints, and read the run's own metrics.

    Raises:
        StreamtrainError: ``engine.dtype`` is ``auto``, or the run failed.
    """
    if config.engine.dtype == "auto":
        raise StreamtrainError("engine.dtype is auto; set engine.dtype=bf16 or engine.dtype=fp32 for the plan")
    records, resolved = run_training(config, ranks, {"steps": steps, "checkpoint_every": 0})
    on_gpu = "memory/gpu_bytes" in records[-1]
    planned = plan(
        resolved, ranks, on_gpu=on_gpu, bf16=resolved.engine.dtype == "bf16", images=configured_images(resolved)
    )
    expected = planned.step_bytes
    measured = max(record["memory/gpu_bytes" if on_gpu else "memory/peak_rss_bytes"] for record in records)
    parts = {f"planned_{p.name.replace(' ', '_')}_bytes": p.num_bytes for p in planned.parts if p.location != "disk"}
    return {
        "measured_peak_bytes": int(measured),
        "planned_peak_bytes": expected,
        "ratio": measured / expected,
        "peak_phase": max(STEP_PHASES, key=planned.rank_bytes_at),
        "step_seconds": records[-1]["speed/step_seconds"],
        # of the steps after the first, which fills the queues
        "wait_share": float(np.mean([record["data/wait_share"] for record in records[1:] or records])),
        **parts,
    }
