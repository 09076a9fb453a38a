"""The run directory: its creation, paths of checkpoints, and the files that describe the run. Torch-free."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.format.files import read_json, write_whole
from streamtrain.config.load import RESOLVED_NAME, read_resolved, to_yaml
from streamtrain.config.tree import Config
from streamtrain.errors import CheckpointError, ConfigError, StreamtrainError
from streamtrain.run.atomic_io import compute_checksum, write_file
from streamtrain.run.lock import LOCK_NAME
from streamtrain.run.provenance import ENVIRONMENT_NAME, describe_environment
from streamtrain.run.signals import SAVE_NAME, STOP_NAME
from streamtrain.run.step_manifest import CheckpointManifest, find_fault

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
QUARANTINE_NAME = "quarantine.jsonl"
BEST_NAME = "best.json"
# evaluation of the starting network and of the pixels
BASELINES_NAME = "baselines.json"
# features of the evaluation images at the start, of a run from trained weights
START_FEATURES_NAME = "start_features.safetensors"
# every message with its time, also those of libraries that the terminal does not show
MESSAGES_NAME = "messages.log"
# of failures that do not end the run
TRACEBACKS_NAME = "tracebacks.log"
# the two kinds of checkpoints, and their folders: the whole state of the run, or only the teacher
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
# step, position in the stream and provenance of a checkpoint
STATE_NAME = "state.json"
# files that a directory may contain before its first run, besides logs of a scheduler or a shell
_ALLOWED_NAMES = (STOP_NAME, SAVE_NAME, "lost+found")
_LOG_SUFFIXES = (".log", ".out", ".err")
# files and folders written under their final names, where a link would lead out of the directory
_WRITTEN_NAMES = (
    METRICS_NAME, QUARANTINE_NAME, TENSORBOARD_NAME, MESSAGES_NAME, TRACEBACKS_NAME, CHECKPOINTS, SNAPSHOTS,
)  # fmt: skip
# errors of a disk that may pass
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_CHECKPOINT = re.compile(r"step-([0-9]{9})")
# with fewer samples, nearest neighbours say little about how features spread
MIN_KOLEO_SAMPLES = 8


def step_folder(run_dir: str | Path, step: int, kind: str = CHECKPOINTS) -> Path:
    """Return the folder of the checkpoint (or snapshot) after ``step`` completed steps."""
    return Path(run_dir) / kind / f"step-{step:09d}"


def parse_step(folder: Path) -> int:
    """Return the completed steps of a folder named by ``step_folder``."""
    return int(folder.name.removeprefix("step-"))


def saved_steps(run_dir: str | Path, kind: str = CHECKPOINTS) -> list[int]:
    """Return the steps with a completely written checkpoint, ascending.

    Raises:
        CheckpointError: the folder cannot be read, which must not become a fresh start.
    """
    parent = Path(run_dir) / kind
    try:
        names = os.listdir(parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{parent} cannot be read ({error.strerror})") from None
    return sorted(int(match.group(1)) for name in names if (match := _CHECKPOINT.fullmatch(name)))


def make_run_dir(run_dir: Path, rank: int) -> None:
    """Create the run directory and write a test file to it; every rank calls this, because each needs access.

    A full or failing disk does not keep a run with a checkpoint from resuming: the space may come back.

    Raises:
        StreamtrainError: the directory cannot be created or written, contains files of something else, or links in
            place of files that a run writes.
    """
    foreign: str | None = None
    probe, link = run_dir / f".rank-{rank}.probe", None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        foreign = _find_foreign_name(run_dir)
        if foreign is None:
            link = next((run_dir / name for name in _WRITTEN_NAMES if (run_dir / name).is_symlink()), None)
            write_file(probe, b"writable")
            probe.unlink()
    except OSError as error:
        if error.errno not in _DISK_TROUBLE or not saved_steps(run_dir):
            raise StreamtrainError(
                f"the run directory {run_dir} cannot be written ({error.strerror}); set run.dir to a writable directory"
            ) from None
        logger.warning("the run directory %s cannot be written at present (%s)", run_dir, error.strerror)
        with suppress(OSError):
            probe.unlink()
    if foreign is not None:
        raise StreamtrainError(
            f"run.dir {run_dir} contains no run but other files, such as {foreign}; set run.dir to a new or empty "
            "directory"
        )
    if link is not None:
        raise StreamtrainError(
            f"{link} is a link to {os.readlink(link)}, and a run does not write through links; replace the link by "
            "a copy of its target, or set run.dir to another directory"
        )


def _find_foreign_name(run_dir: Path) -> str | None:
    """Return the first unexpected file name in the directory, or None if a run may write to it."""
    if (run_dir / LOCK_NAME).exists() or saved_steps(run_dir) or _has_environment(run_dir):
        return None
    names = sorted(entry.name for entry in run_dir.iterdir() if not entry.name.startswith("."))
    return next((name for name in names if name not in _ALLOWED_NAMES and not name.endswith(_LOG_SUFFIXES)), None)


def _has_environment(run_dir: Path) -> bool:
    """Return whether a run, and not another program, wrote the directory's ``environment.json``."""
    try:
        document = read_json(run_dir / ENVIRONMENT_NAME)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "world_size" in document


def starting_checkpoint(run_dir: Path, resume_from: Path | None) -> Path | None:
    """Return the latest of ``candidates`` whose file sizes and ``state.json`` are intact, or None without any.

    Raises:
        CheckpointError: it was renamed to another step.
    """
    folders = candidates(run_dir, resume_from)
    for folder in folders:
        if find_fault(folder, contents=False) is None and (state := saved_state(folder)) is not None:
            check_step(folder, state)
            return folder
    # if none is intact, reading the latest one reports its fault
    return folders[0] if folders else None


def check_step(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the folder is named by another step than its ``state.json``."""
    step = state.get("step")
    if _CHECKPOINT.fullmatch(folder.name) and isinstance(step, int) and step != parse_step(folder):
        raise CheckpointError(
            f"checkpoint {folder} was renamed: its {STATE_NAME} has step {step}; rename it to "
            f"{step_folder(Path(), step).name}, or delete it to resume without it"
        )


def saved_state(source: Path) -> dict[str, Any] | None:
    """Return the ``state.json`` of a checkpoint, or None if it is damaged (reading the checkpoint reports that)."""
    try:
        if CheckpointManifest.read(source).files[STATE_NAME] != compute_checksum(source / STATE_NAME):
            return None
        state = read_json(source / STATE_NAME)
        return state if isinstance(state["data"]["lane_block"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def candidates(run_dir: Path, resume_from: Path | None) -> list[Path]:
    """Return the checkpoints that a run may resume, latest first: its own, else those of ``resume_from``.

    Raises:
        CheckpointError: ``resume_from`` has no checkpoint.
    """
    for folder in (run_dir, resume_from):
        if folder is not None and (steps := saved_steps(folder)):
            return [step_folder(folder, step) for step in reversed(steps)]
    if resume_from is not None:
        raise CheckpointError(f"--resume {resume_from} has no checkpoint; give the directory of a run that saved one")
    return []


def completion_message(config: Config, source: Path | None) -> str | None:
    """Return a message if the checkpoint ``source`` completes the run, else None."""
    if source is None:
        return None
    run_dir, step = source.parent.parent, parse_step(source)
    if step < config.run.steps:
        return None
    return f"already complete: {step} steps in {run_dir}; raise run.steps (now {config.run.steps}) to continue"


def check_weights(config: Config, source: Path | None) -> None:
    """Check that the weights to load exist; their contents are checked when they are loaded.

    Raises:
        ConfigError: a file or folder is missing, or the anchor or LoRA has no weights to start from.
    """
    paths = {} if config.teacher.model is None else {"teacher.weights": config.teacher.weights}
    if source is None:
        if config.objective.anchor.is_active and config.init.weights is None:
            raise ConfigError(
                "objective.anchor has no starting network; set init.weights to a backbone (a Hugging Face or timm "
                "folder, Meta's file, an export or a run), or start with --resume RUN"
            )
        if config.model.lora.rank and config.init.weights is None:
            raise ConfigError(
                "model.lora freezes the backbone, which would stay random: set init.weights, or model.lora.rank=0"
            )
        paths["init.weights"] = config.init.weights
        if config.objective.gram.is_active and config.objective.gram.teacher != "ema":
            paths["objective.gram.teacher"] = config.objective.gram.teacher
    if config.evaluation.stop_if_below is not None:
        _check_stop(config, source)
    for key, weights in paths.items():
        if weights is not None and not Path(weights).exists():
            raise ConfigError(f"{key}: there is no file or folder {weights}")
    if config.teacher.weights is not None and config.teacher.model is None:
        read_resolved(Path(config.teacher.weights))


def _check_stop(config: Config, source: Path | None) -> None:
    """Raise ConfigError if ``evaluation.stop_if_below`` would never act."""
    evaluation, never = config.evaluation, "or evaluation.stop_if_below=null"
    if source is None and config.init.weights is None:
        raise ConfigError(f"evaluation.stop_if_below needs a starting network; set init.weights, {never}")
    if not 0 < evaluation.every <= config.run.steps:
        raise ConfigError(
            f"evaluation.stop_if_below is never checked: evaluation.every is {evaluation.every}, and the run has "
            f"{config.run.steps} steps; set it to at most {config.run.steps}, {never}"
        )


def describe_run(run_dir: Path, config: Config, world_size: int, computed: Mapping[str, Any]) -> None:
    """Write ``config.yaml`` (resolved) and ``environment.json``; one rank calls it. Raises OSError.

    Args:
        computed: ``device``, ``dtype``, number of ``images`` and planned memory of the run.
    """
    document = json.dumps(describe_environment(world_size) | dict(computed), indent=1)
    for name, text in {RESOLVED_NAME: to_yaml(config), ENVIRONMENT_NAME: f"{document}\n"}.items():
        write_whole(run_dir / name, text.encode())


def log_start_notes(config: Config, world_size: int) -> None:
    """Warn of doubtful settings; rank 0 calls this."""
    koleo = config.objective.koleo
    samples = koleo.samples(config.data.micro_batch, world_size)
    if koleo.weight.is_ever_positive and samples < MIN_KOLEO_SAMPLES:
        logger.warning(
            f"KoLeo searches nearest neighbours among only {samples} sample(s), which says little about how features "
            "spread; raise data.micro_batch, set objective.koleo.distributed=true, or set its weight to 0"
        )
