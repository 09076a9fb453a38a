"""The run folder: made and checked before any process group, and what it says of where it was made."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from streamtrain.config.load import RESOLVED_NAME, to_yaml
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError

ENVIRONMENT_NAME = "environment.json"
# with fewer candidates the nearest neighbour is hardly near
FEW_NEIGHBOURS = 8
_LIBRARIES = ("streamtrain", "torch", "deepspeed", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def make_run_folder(run_dir: Path, rank: int) -> None:
    """Make the folder and try to write in it; called by every rank, since each must reach it.

    Raises:
        StreamtrainError: if it cannot be made or written.
    """
    probe = run_dir / f".rank-{rank}.probe"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"writable")
        probe.unlink()
    except OSError as error:
        raise StreamtrainError(
            f"the run folder {run_dir} cannot be written ({error.strerror}); set run.dir to a folder that can"
        ) from None


def describe_run(run_dir: Path, config: Config, world_size: int) -> None:
    """Write ``config.yaml`` (resolved) and ``environment.json``; one rank calls it."""
    (run_dir / RESOLVED_NAME).write_text(to_yaml(config), encoding="utf-8")
    document = json.dumps(_environment(world_size), indent=1)
    (run_dir / ENVIRONMENT_NAME).write_text(document + "\n", encoding="utf-8")


def start_notes(config: Config, world_size: int) -> list[str]:
    """What a user should know before the first step: numbers that follow from others, and doubtful choices."""
    global_batch, accumulation = config.batch_split(world_size)
    micro_batch = config.data.micro_batch
    notes = [f"batch {global_batch} = {micro_batch} x {world_size} rank(s) x {accumulation} micro-batch(es)"]
    if config.optim.lr_reference_batch is not None:
        factor, peak = config.optim.lr_factor(global_batch), config.schedules.lr.peak
        notes.append(
            f"lr peak {peak * factor:.3g} = {peak:.3g} x {factor:.3g} "
            f"({config.optim.lr_scaling} of batch {global_batch} / {config.optim.lr_reference_batch})"
        )
    samples = config.objective.koleo.samples(micro_batch, world_size)
    if config.objective.koleo.weight.ever_positive and samples < FEW_NEIGHBOURS:
        notes.append(
            f"warning: KoLeo finds nearest neighbours among {samples} sample(s) only, which says little about how "
            "features spread; raise data.micro_batch, set objective.koleo.distributed=true, or its weight to 0"
        )
    return notes


def _environment(world_size: int) -> dict[str, Any]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # a checkout that was not installed, or the other DALI
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "world_size": world_size,
        "versions": versions,
    }
