"""Distillation: a frozen teacher, usually a larger one, instead of the student's EMA."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from streamtrain.checkpoint import reader as checkpoint
from streamtrain.config.load import read_resolved
from streamtrain.config.tree import Config
from streamtrain.engine.teacher import FrozenNetwork
from streamtrain.errors import CheckpointError, ConfigError


def frozen_teacher_config(config: Config) -> Config:
    """Return ``config`` with the model and heads of the run ``teacher.weights``; unchanged with a feature teacher.

    Raises:
        ConfigError: if there is no such run, or its outputs do not fit this student.
    """
    if config.teacher.model is not None:
        return config
    assert config.teacher.weights is not None
    teacher = read_resolved(Path(config.teacher.weights))
    if teacher.model.factory not in (None, config.model.factory):
        # only the user's own settings may choose the code that is executed
        raise ConfigError(
            f"the teacher in {config.teacher.weights} has a network of its author's own code, {teacher.model.factory}, "
            "which can only teach a student with the same model.factory"
        )
    if teacher.model.channels != config.model.channels:
        raise ConfigError(
            f"teacher.weights: {config.teacher.weights} takes {teacher.model.channels} channels, but the images have "
            f"{config.data.pixels}; use a teacher of the same channels"
        )
    objective, patch = config.objective, config.objective.patch_loss
    keys = ["model.patch_size", "objective.global_loss.head.prototypes"]
    is_ibot = patch.kind == "ibot"
    keys += ["objective.patch_loss.kind", "objective.patch_loss.head.prototypes"] if is_ibot else ["model.dim"]
    for key in keys:
        student_value, teacher_value = (attrgetter(key)(each) for each in (config, teacher))
        if student_value != teacher_value:
            raise ConfigError(
                f"{key} is {student_value}, but the teacher in {config.teacher.weights} has {teacher_value}; "
                "set it to the teacher's value"
            )
    objective = objective.model_copy(
        update={
            "global_loss": objective.global_loss.model_copy(update={"head": teacher.objective.global_loss.head}),
            "patch_loss": patch.model_copy(update={"head": teacher.objective.patch_loss.head}),
        }
    )
    return config.model_copy(update={"model": teacher.model, "objective": objective})


def fill_frozen_teacher(config: Config, network: FrozenNetwork) -> None:
    """Fill ``network`` with the teacher in the newest checkpoint of ``teacher.weights``.

    Raises:
        CheckpointError: if there is none, or it has a different model.
    """
    folder = Path(str(config.teacher.weights))
    steps = checkpoint.saved_steps(folder)
    if not steps:
        raise CheckpointError(f"teacher.weights: {folder} has no checkpoint")
    source = checkpoint.step_folder(folder, steps[-1])
    if fault := checkpoint.find_fault_on_any_rank(source):
        raise checkpoint.damage_error(source, fault)
    with checkpoint.open_checkpoint(source, is_verified=True) as reader:
        network.write(lambda name, fragment: reader.read(f"ema/{name}", fragment))
