"""Retention of step directories: removed and damaged ones are renamed first, so that no start finds them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.format.files import read_json, remove_tree, sync, write_whole
from streamtrain.config.run import RunConfig
from streamtrain.run.directory import BEST_NAME, CHECKPOINTS, SNAPSHOTS, saved_steps, step_folder


def prune(run_dir: Path, config: RunConfig) -> None:
    """Remove the checkpoints that ``config`` does not keep; call it once the newest is complete. Raises OSError."""
    steps = saved_steps(run_dir)
    kept = set(steps[-config.keep_last :]) if config.keep_last else set(steps)
    kept |= {step for step in steps if config.keep_every and step % config.keep_every == 0}
    kept |= {best["step"]} if (best := read_best(run_dir)) else set()
    for step in sorted(set(steps) - kept):
        folder = step_folder(run_dir, step)
        _rename_to_removed(folder)
        finish_removal(folder)


def publish(partial: Path, folder: Path) -> None:
    """Rename a complete step directory to its final name, replacing one of an earlier start of the run.

    A run that resumes from an earlier step reaches the same step again. Raises OSError; the earlier directory may
    then be gone, and the new one keeps its temporary name.
    """
    if os.path.lexists(folder):
        _rename_to_removed(folder)
    os.rename(partial, folder)


def finish_removal(folder: Path) -> None:
    """Sync the name of a step directory to disk, then remove the directory renamed before it. Raises OSError."""
    sync(folder.parent)
    remove_tree(_removed_of(folder))


def _removed_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")


def _rename_to_removed(folder: Path) -> None:
    """Rename a step directory before its removal: a partly removed one must not be taken for a checkpoint."""
    remove_tree(_removed_of(folder))
    os.replace(folder, _removed_of(folder))


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """Return ``step``, ``metric`` and ``value`` of the best checkpoint so far; None if there is none."""
    try:
        best = read_json(run_dir / BEST_NAME)
    except (OSError, ValueError):
        return None
    if not isinstance(best, dict) or not isinstance(best.get("step"), int) or not isinstance(best.get("value"), float):
        return None
    # nothing would ever beat NaN or Inf
    return best if math.isfinite(best["value"]) else None


def best_value(run_dir: Path, metric: str, step: int) -> float | None:
    """Return the value of the best checkpoint by ``metric`` up to ``step``; None if that checkpoint is gone."""
    best = read_best(run_dir)
    if best is None or best.get("metric") != metric or best["step"] > step or best["step"] not in saved_steps(run_dir):
        return None
    return float(best["value"])


def write_best(run_dir: Path, best: Mapping[str, Any]) -> None:
    """Record the best checkpoint, once it is complete; pruning may then remove the previous best. Raises OSError."""
    write_whole(run_dir / BEST_NAME, json.dumps(dict(best)).encode() + b"\n")


def partial_of(folder: Path) -> Path:
    """Return the temporary directory in which a step directory is written."""
    return folder.with_name(f".{folder.name}.partial")


def remove_leftovers(run_dir: Path) -> None:
    """Remove the remains of a save or removal that was killed; call it while no save is running."""
    for kind in (CHECKPOINTS, SNAPSHOTS):
        # if this fails, so does the next save, which reports it
        with suppress(OSError):
            for leftover in (*(run_dir / kind).glob(".step-*"), *(run_dir / kind).glob(".latest.*")):
                with suppress(OSError):
                    remove_tree(leftover)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it can still be inspected; returns its new path."""
    aside = folder.with_name(f"damaged-{folder.name}")
    try:
        remove_tree(aside)
        os.replace(folder, aside)
    except OSError:
        return folder  # a read-only directory
    return aside
