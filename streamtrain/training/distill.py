"""A frozen teacher, usually a larger one, that a student learns from instead of from its own average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamtrain.checkpoint import reader as checkpoint
from streamtrain.config.load import read_resolved
from streamtrain.config.tree import Config
from streamtrain.engine.teacher import FrozenNetwork
from streamtrain.errors import CheckpointError, ConfigError


def frozen_teacher_config(config: Config) -> Config:
    """``config`` with the model and heads of the run that ``teacher.weights`` names.

    Raises:
        ConfigError: if there is no such run, or it cannot teach this student.
    """
    assert config.teacher.weights is not None
    theirs = read_resolved(Path(config.teacher.weights).expanduser())
    ours, patch = config.objective, config.objective.patch_loss
    must_agree: list[tuple[str, Any, Any]] = [
        ("model.patch_size", config.model.patch_size, theirs.model.patch_size),
        (
            "objective.global_loss.head.prototypes",
            ours.global_loss.head.prototypes,
            theirs.objective.global_loss.head.prototypes,
        ),
    ]
    if patch.kind == "ibot":
        must_agree.append(("objective.patch_loss.kind", patch.kind, theirs.objective.patch_loss.kind))
        prototypes = theirs.objective.patch_loss.head.prototypes
        must_agree.append(("objective.patch_loss.head.prototypes", patch.head.prototypes, prototypes))
    else:
        must_agree.append(("model.dim", config.model.dim, theirs.model.dim))
    for key, mine, wanted in must_agree:
        if mine != wanted:
            folder = config.teacher.weights
            raise ConfigError(f"{key} is {mine}, but the teacher in {folder} has {wanted}; set it to that")
    objective = ours.model_copy(
        update={
            "global_loss": ours.global_loss.model_copy(update={"head": theirs.objective.global_loss.head}),
            "patch_loss": patch.model_copy(update={"head": theirs.objective.patch_loss.head}),
        }
    )
    return config.model_copy(update={"model": theirs.model, "objective": objective})


def fill_frozen_teacher(config: Config, network: FrozenNetwork) -> None:
    """Read the teacher of the newest checkpoint of ``teacher.weights``.

    Raises:
        CheckpointError: if there is none, or it belongs to another model.
    """
    folder = Path(str(config.teacher.weights)).expanduser()
    steps = checkpoint.saved_steps(folder)
    if not steps:
        raise CheckpointError(f"teacher.weights {folder} has no checkpoint")
    source = checkpoint.step_folder(folder, steps[-1])
    if fault := checkpoint.find_fault_on_any_rank(source):
        raise checkpoint.damage_error(source, fault)
    with checkpoint.open_checkpoint(source) as reader:
        network.write(lambda name, fragment: reader.read(f"ema/{name}", fragment))
