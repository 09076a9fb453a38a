"""The run folder: whose it is, who writes to it, where its checkpoints lie, and what it says of where it was made.

Free of torch, so that a start that cannot succeed is told within a second or two.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.format.files import read_json
from streamtrain.config.load import RESOLVED_NAME, read_resolved, to_yaml
from streamtrain.config.tree import Config
from streamtrain.errors import CheckpointError, ConfigError, StreamtrainError
from streamtrain.run.atomic_io import replace_file, sum_of
from streamtrain.run.provenance import ENVIRONMENT_NAME, environment
from streamtrain.run.signals import SAVE_NAME, STOP_NAME
from streamtrain.run.step_manifest import fault_of, read_manifest

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
QUARANTINE_NAME = "quarantine.jsonl"
BEST_NAME = "best.json"
# folders of a run that hold one folder a step: all that a run goes on from, and the teacher alone
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
# of a checkpoint: how far it is, where in the stream, and what made it
STATE_NAME = "state.json"
LOCK_NAME = ".streamtrain.lock"
# what may lie in a folder before its first run: a request to it, a volume's own folder, ...
_BEFORE_A_RUN = (STOP_NAME, SAVE_NAME, "lost+found")
# ... and what a scheduler or a shell writes of the job
_LOG_SUFFIXES = (".log", ".out", ".err")
_CHECKPOINT = re.compile(r"^step-(\d{9})$")
# with fewer candidates the nearest neighbour is hardly near
FEW_NEIGHBOURS = 8


def folder_of(run_dir: str | Path, step: int, place: str = CHECKPOINTS) -> Path:
    """Where the checkpoint, or another thing in ``place``, of ``step`` completed steps lies."""
    return Path(run_dir) / place / f"step-{step:09d}"


def step_of(folder: Path) -> int:
    """Completed steps of what ``folder_of`` gave."""
    return int(folder.name.removeprefix("step-"))


def saved_steps(run_dir: str | Path, place: str = CHECKPOINTS) -> list[int]:
    """Steps of which a checkpoint was written to its end, ascending.

    Raises:
        CheckpointError: if nobody can tell, which must not be taken for a fresh start.
    """
    parent = Path(run_dir) / place
    try:
        names = os.listdir(parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{parent} cannot be read ({error.strerror})") from None
    return sorted(int(match.group(1)) for name in names if (match := _CHECKPOINT.match(name)))


def make_run_folder(run_dir: Path, rank: int) -> None:
    """Make the folder and try to write in it; called by every rank, since each must reach it.

    Raises:
        StreamtrainError: if it cannot be made or written, or holds something that is no run.
    """
    probe = run_dir / f".rank-{rank}.probe"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        foreign = _foreign(run_dir)
        if foreign is None:
            probe.write_bytes(b"writable")
            probe.unlink()
    except OSError as error:
        raise StreamtrainError(
            f"the run folder {run_dir} cannot be written ({error.strerror}); set run.dir to a folder that can"
        ) from None
    if foreign is not None:
        raise StreamtrainError(
            f"run.dir {run_dir} holds no run but other files, such as {foreign}; set run.dir to a new or empty folder"
        )


def _foreign(run_dir: Path) -> str | None:
    """The first name in a folder that is no run's, or None where a run may write."""
    if (run_dir / LOCK_NAME).exists() or saved_steps(run_dir) or _has_environment(run_dir):
        return None
    names = sorted(entry.name for entry in run_dir.iterdir() if not entry.name.startswith("."))
    return next((name for name in names if name not in _BEFORE_A_RUN and not name.endswith(_LOG_SUFFIXES)), None)


def _has_environment(run_dir: Path) -> bool:
    """Whether the folder holds an ``environment.json`` that a run wrote, and not some other program."""
    try:
        document = read_json(run_dir / ENVIRONMENT_NAME)
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "world_size" in document


@contextmanager
def held(run_dir: Path, rank: int) -> Iterator[None]:
    """Keep other runs out of the folder for the time of the ``with`` block; rank 0 does so for all ranks.

    The system lets go of the lock when the process ends, however it ends. (A lock that is a mere file would outlive a
    kill, and keep out the very start that is to go on.)

    Raises:
        StreamtrainError: if another run has it.
    """
    if rank > 0:
        yield
        return
    descriptor = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise StreamtrainError(
            f"another run is writing to {run_dir}; wait for its end, stop it with `touch {run_dir / STOP_NAME}`, "
            "or set run.dir to another folder"
        ) from None
    except OSError:
        pass  # a file system without locks; that must keep nobody from training
    try:
        yield
    finally:
        os.close(descriptor)


def starting_checkpoint(run_dir: Path, resume_from: Path | None) -> Path | None:
    """The checkpoint to go on from, as far as can be told from sizes and its own description.

    Raises:
        CheckpointError: if there is to be one in ``resume_from``, and is not.
    """
    found = candidates(run_dir, resume_from)
    whole = (each for each in found if fault_of(each, contents=False) is None and saved_state(each) is not None)
    # where none is whole, reading the newest says what is wrong with it
    return next(whole, found[0] if found else None)


def saved_state(source: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None if that is damaged, which is told when all of it is read."""
    try:
        if read_manifest(source)[STATE_NAME] != sum_of(source / STATE_NAME):
            return None
        state = read_json(source / STATE_NAME)
        return state if isinstance(state["data"]["lane_block"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def candidates(run_dir: Path, resume_from: Path | None) -> list[Path]:
    """The checkpoints that a run may go on from, the best first: its own, else those of ``resume_from``, by age.

    Raises:
        CheckpointError: if there is to be one in ``resume_from``, and is not.
    """
    for folder in (run_dir, resume_from):
        if folder is not None and (steps := saved_steps(folder)):
            return [folder_of(folder, step) for step in reversed(steps)]
    if resume_from is not None:
        raise CheckpointError(f"--resume {resume_from} holds no checkpoint; give the folder of a run that saved one")
    return []


def nothing_left(config: Config, source: Path | None) -> str | None:
    """What to say of a run whose ``source`` (see ``starting_checkpoint``) has all its steps; None of any other."""
    if source is None:
        return None
    run_dir, step = source.parent.parent, step_of(source)
    if step < config.run.steps:
        return None
    return f"already complete: {step} steps in {run_dir}; raise run.steps (now {config.run.steps}) to go on"


def check_weights(config: Config, source: Path | None) -> None:
    """Whether the weights that a start reads are there; what they hold is seen when they are read.

    Raises:
        ConfigError: if they are not.
    """
    needed = {}
    if source is None:
        needed["init.weights"] = config.init.weights
        if config.objective.gram.active and config.objective.gram.teacher != "ema":
            needed["objective.gram.teacher"] = config.objective.gram.teacher
    for key, weights in needed.items():
        if weights is not None and not Path(weights).expanduser().exists():
            raise ConfigError(f"{key}: the weights {weights} cannot be read: there is no such file or folder")
    if config.teacher.weights is not None:
        read_resolved(Path(config.teacher.weights).expanduser())


def describe_run(run_dir: Path, config: Config, world_size: int, computed: Mapping[str, str]) -> None:
    """Write ``config.yaml`` (resolved) and ``environment.json``, for people and tools; one rank calls it.

    Args:
        computed: where and how the network computes, its ``device`` and ``dtype``.
    """
    document = json.dumps(environment(world_size) | dict(computed), indent=1)
    replace_file(run_dir / RESOLVED_NAME, to_yaml(config).encode())
    replace_file(run_dir / ENVIRONMENT_NAME, f"{document}\n".encode())


def start_notes(config: Config, world_size: int) -> list[str]:
    """What a user should know before the first step: numbers that follow from others, and doubtful choices."""
    global_batch, accumulation = config.batch_split(world_size)
    micro_batch = config.data.micro_batch
    notes = [f"batch {global_batch} = {micro_batch} x {world_size} rank(s) x {accumulation} micro-batch(es)"]
    if len(config.data.shares) > 1:
        notes.append(f"images: {config.data.shards_text}")
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
