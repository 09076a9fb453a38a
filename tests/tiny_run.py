"""The training command for a network of a few thousand parameters."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ranks import ROOT, run_ranks, start_ranks
from tiny_backbone import TINY

from streamtrain.checkpoint import reader as checkpoint

HEAD = "{prototypes: 32, hidden: 16, bottleneck: 8}"


def command(shards: Path | str, run_dir: Path, *overrides: str) -> list[str]:
    """Return the command of a run; ``overrides`` come last."""
    model = [f"model.{key}={value}" for key, value in TINY.items()]
    return [
        str(ROOT / "streamtrain" / "main.py"), "--config", "vits16.yaml", *model, f"data.shards={shards}",
        f"run.dir={run_dir}", "crops.global_size=32", "crops.local_size=16", "crops.local_count=1",
        f"objective.global_loss.head={HEAD}", f"objective.patch_loss.head={HEAD}", "data.micro_batch=4",
        "engine.cpu_threads=1", "engine.device=cpu", "engine.dtype=fp32", "data.decode_threads=1",
        "monitor.progress=false", "monitor.tensorboard=false", "data.lanes=2", "run.checkpoint_every=1",
        "schedules.lr={kind: constant, peak: 1e-2, end: null, warmup: 0}", "run.keep_last=0", *overrides,
    ]  # fmt: skip


def logged(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the losses and the gradient norms of each step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: {k: v for k, v in r.items() if k.startswith(("loss/", "slot", "optim/grad"))} for r in records}


def kill_and_resume(words: list[str], run_dir: Path, step: int, ranks: int = 2) -> None:
    """Start ranks, kill them once ``step`` is saved, and run the same command to its end."""
    processes = start_ranks(words, ranks)
    deadline = time.monotonic() + 200
    while (checkpoint.saved_steps(run_dir) or [0])[-1] < step:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    results = run_ranks(words, ranks)
    assert [code for code, _, _ in results] == [0] * ranks, results[0][2][-3000:]
