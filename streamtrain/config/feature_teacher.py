"""Settings that do not fit a feature teacher, a frozen backbone without heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from streamtrain.config.objective import ObjectiveConfig
from streamtrain.config.schedules import SchedulesConfig

if TYPE_CHECKING:
    from streamtrain.config.tree import Config

_PROTOTYPE_KEYS = ("centering", "sinkhorn_iterations", "center_momentum", "student_temperature")
_SCHEDULES = ("teacher_temperature", "freeze_last_layer")


def find_teacher_fault(config: Config) -> str | None:
    """Return why the settings do not fit the feature teacher ``teacher.model``, or None."""
    teacher = config.teacher.backbone
    assert teacher is not None
    if config.teacher.kind != "frozen":
        return "teacher.model has an effect only with teacher.kind: frozen"
    if teacher.channels != config.model.channels:
        return (
            f"teacher.weights: {config.teacher.weights} takes {teacher.channels} channels, but the images have "
            f"{config.data.pixels}; use a teacher of the same channels"
        )
    for sizes in config.crop_sizes:
        if not sizes.global_size.fits(teacher.patch_size):
            return (
                f"global crops of {sizes.global_size} pixels are not a multiple of the patches of {teacher.patch_size} "
                f"pixels of the teacher in {config.teacher.weights}; change crops.global_size"
            )
    for name, width in (("dim", teacher.dim), ("mlp_hidden", teacher.hidden)):
        if config.engine.fp8 and width % 16:
            return f"the teacher's {name} is {width}; with engine.fp8 it must be a multiple of 16"
    if keys := list(_prototype_settings(config)):
        return (
            f"the teacher in {config.teacher.weights} is a backbone without prototypes, so these settings have no "
            f"effect: {', '.join(keys)}; remove them (configs/distil_features.yaml has none)"
        )
    return None


def _prototype_settings(config: Config) -> Iterator[str]:
    """Yield the keys of prototypes that differ from their defaults."""
    objective, defaults = config.objective, ObjectiveConfig()
    for key in _PROTOTYPE_KEYS:
        if getattr(objective, key) != getattr(defaults, key):
            yield f"objective.{key}"
    for loss in ("global_loss", "patch_loss"):
        given, default = getattr(objective, loss), getattr(defaults, loss)
        for key in ("kind", "reduction", "head"):
            if getattr(given, key, None) != getattr(default, key, None):
                yield f"objective.{loss}.{key}"
    for key in _SCHEDULES:
        if getattr(config.schedules, key) != getattr(SchedulesConfig(), key):
            yield f"schedules.{key}"
