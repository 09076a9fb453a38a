"""Planned and measured peak memory of each rank over a few real training steps, by part."""

from __future__ import annotations

from typing import Any

from benchmarks.training import trained
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.planning.memory import plan


def run(config: Config, ranks: int, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps on ``ranks`` ranks of this machine, without checkpoints; the run's own figures count.

    Raises:
        StreamtrainError: if the number format is left open, or the run fails.
    """
    if config.engine.dtype == "auto":
        raise StreamtrainError("set engine.dtype=bf16 or engine.dtype=fp32, so that the plan knows it too")
    records, resolved = trained(config, ranks, {"steps": steps, "checkpoint_every": 0})
    on_gpu = "memory/gpu_bytes" in records[-1]
    planned = plan(resolved, ranks, on_gpu=on_gpu, bf16=resolved.engine.dtype == "bf16")
    phase = planned.peak_phase
    expected = planned.gpu_bytes if on_gpu else planned.at(phase) + planned.at(phase, "host")
    measured = max(record["memory/gpu_bytes" if on_gpu else "memory/peak_rss_bytes"] for record in records)
    parts = {f"planned_{p.name.replace(' ', '_')}_bytes": p.num_bytes for p in planned.parts if p.location != "disk"}
    return {
        "measured_peak_bytes": int(measured),
        "planned_peak_bytes": expected,
        "ratio": measured / expected,
        "peak_phase": phase,
        "step_seconds": records[-1]["speed/step_seconds"],
        **parts,
    }
