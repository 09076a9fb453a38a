"""Which step folders stay. One that goes, or that turned out damaged, first loses the name by which it is found."""

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
    """Remove the checkpoints that the retention rule does not keep; call it when the newest is whole.

    Raises:
        OSError: if one cannot be removed.
    """
    steps = saved_steps(run_dir)
    kept = set(steps[-config.keep_last :]) if config.keep_last else set(steps)
    kept |= {step for step in steps if config.keep_every and step % config.keep_every == 0}
    kept |= {best["step"]} if (best := read_best(run_dir)) else set()
    for step in sorted(set(steps) - kept):
        folder = step_folder(run_dir, step)
        # what is half removed must not be taken for a checkpoint
        os.replace(folder, removed := folder.with_name(f".{folder.name}.removed"))
        sync(folder.parent)
        shutil.rmtree(removed)


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """Of the best checkpoint so far: its ``step``, the ``metric`` by which it is, and the ``value`` of that."""
    try:
        best = json.loads((run_dir / BEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(best, dict) and isinstance(best.get("step"), int) and isinstance(best.get("value"), float)
    return best if whole else None


def best_value(run_dir: Path, metric: str, step: int) -> float | None:
    """That of the best checkpoint by ``metric`` up to ``step``, where it is still there."""
    best = read_best(run_dir)
    if best is None or best.get("metric") != metric or best["step"] > step or best["step"] not in saved_steps(run_dir):
        return None
    return float(best["value"])


def write_best(run_dir: Path, best: Mapping[str, Any]) -> None:
    """Remember the best checkpoint, once it is whole; the one before is no longer kept for being the best.

    Raises:
        OSError: if that cannot be written.
    """
    replace_file(run_dir / BEST_NAME, json.dumps(dict(best)).encode() + b"\n")


def partial_of(folder: Path) -> Path:
    """Where the files of a step folder are written before it gets its name."""
    return folder.with_name(f".{folder.name}.partial")


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process has half written or half removed; nobody else may be writing."""
    for place in (CHECKPOINTS, SNAPSHOTS):
        for leftover in (run_dir / place).glob(".step-*"):
            # where that cannot be done, neither can a checkpoint be written, and then that is told
            shutil.rmtree(leftover, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, which somebody may still want to look at; returns where it is now."""
    aside = folder.with_name(f"damaged-{folder.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    except OSError:
        return folder  # a read-only folder
    return aside
