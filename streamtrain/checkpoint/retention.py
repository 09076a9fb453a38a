"""Retention of step directories: removed and damaged ones are renamed first, so that no start finds them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamtrain.config.run import RunConfig
from streamtrain.run.atomic_io import replace_file, sync
from streamtrain.run.directory import BEST_NAME, CHECKPOINTS, SNAPSHOTS, saved_steps, step_folder


def prune(run_dir: Path, config: RunConfig) -> None:
    """Remove the checkpoints that ``config`` does not keep; call it once the newest is complete. Raises OSError."""
    steps = saved_steps(run_dir)
    kept = set(steps[-config.keep_last :]) if config.keep_last else set(steps)
    kept |= {step for step in steps if config.keep_every and step % config.keep_every == 0}
    kept |= {best["step"]} if (best := read_best(run_dir)) else set()
    for step in sorted(set(steps) - kept):
        folder = step_folder(run_dir, step)
        # a partly removed directory must not be taken for a checkpoint
        os.replace(folder, removed := folder.with_name(f".{folder.name}.removed"))
        sync(folder.parent)
        shutil.rmtree(removed)


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """Return ``step``, ``metric`` and ``value`` of the best checkpoint so far; None if there is none."""
    try:
        best = json.loads((run_dir / BEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_valid = isinstance(best, dict) and isinstance(best.get("step"), int) and isinstance(best.get("value"), float)
    return best if is_valid else None


def best_value(run_dir: Path, metric: str, step: int) -> float | None:
    """Return the value of the best checkpoint by ``metric`` up to ``step``; None if that checkpoint is gone."""
    best = read_best(run_dir)
    if best is None or best.get("metric") != metric or best["step"] > step or best["step"] not in saved_steps(run_dir):
        return None
    return float(best["value"])


def write_best(run_dir: Path, best: Mapping[str, Any]) -> None:
    """Record the best checkpoint, once it is complete; pruning may then remove the previous best. Raises OSError."""
    replace_file(run_dir / BEST_NAME, json.dumps(dict(best)).encode() + b"\n")


def partial_of(folder: Path) -> Path:
    """Return the temporary directory in which a step directory is written."""
    return folder.with_name(f".{folder.name}.partial")


def remove_leftovers(run_dir: Path) -> None:
    """Remove directories that a killed process left partly written or removed; call it while no save is running."""
    for kind in (CHECKPOINTS, SNAPSHOTS):
        for leftover in (run_dir / kind).glob(".step-*"):
            # if this fails, so does the next save, which reports it
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it can still be inspected; returns its new path."""
    aside = folder.with_name(f"damaged-{folder.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    except OSError:
        return folder  # a read-only directory
    return aside
