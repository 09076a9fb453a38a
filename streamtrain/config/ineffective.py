"""Settings that have no effect in a run, because the run is too short or the image set too small for them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from shards.format.set_manifest import counted
from streamtrain.config.masks import group_counts
from streamtrain.config.recipes import nearest_recipe
from streamtrain.config.schedules import Schedule
from streamtrain.config.section import Section
from streamtrain.config.tree import Config, walk_settings

# Trained on 500 CIFAR-10 images, no network beat raw pixels in kNN.
MIN_IMAGES = 1000


def ineffective_settings(config: Config, world_size: int, num_samples: int) -> Iterator[str]:
    """Yield one line per group of settings without an effect; ``num_samples`` is the size of the image set."""
    global_batch, _ = config.batch_split(world_size)
    if global_batch > num_samples:
        given = "data.global_batch" if config.data.global_batch else "data.micro_batch"
        yield (
            f"a batch of {global_batch} images repeats images, because the set has only {num_samples}, and the losses "
            f"treat copies as different images; lower {given}, or use more images"
        )
    elif num_samples < MIN_IMAGES:
        number = counted(num_samples, "image")
        yield f"the set has {number}, which is too few to learn features from; use at least 1000"
    steps = config.run.steps
    if unreached := list(_unreached_peaks(config)):
        yield f"run.steps {steps} is too short for {', '.join(unreached)}; lower these settings, or train longer"
    if (
        config.teacher.kind == "ema"
        and not any(_masked_counts(config))
        and (config.objective.patch_loss.weight.is_ever_positive)
    ):
        yield "masks.probability and masks.ratio mask no patch, so objective.patch_loss has no effect"
    if not_due := list(_never_due(config)):
        yield f"never due within run.steps {steps}: {', '.join(not_due)}"


def _unreached_peaks(config: Config) -> Iterator[str]:
    """Yield the schedules that do not reach their peak, and a backbone that stays frozen."""
    steps = config.run.steps
    for key, schedule in _schedules(config):
        ramp = schedule.delay + schedule.warmup
        # a schedule that begins at its peak has none to reach
        if ramp + schedule.tail > steps and schedule.peak != (schedule.start or 0.0):
            parts = {"delay": schedule.delay, "warmup": schedule.warmup, "tail": schedule.tail if ramp <= steps else 0}
            yield from (f"{key}.{name} {length}" for name, length in parts.items() if length)
    # schedules.freeze_last_layer may be longer: some recipes freeze the prototypes for the whole run
    if config.init.freeze_backbone_steps >= steps:
        yield f"init.freeze_backbone_steps ({config.init.freeze_backbone_steps}), so the backbone never learns"


def _never_due(config: Config) -> Iterator[str]:
    """Yield the intervals and first steps beyond the end of the run, unless the shipped recipe has the same.

    Its user shortened the run, and has chosen none of them.
    """
    run, steps = config.run, config.run.steps
    _, changed = nearest_recipe(config)
    gram = config.objective.gram
    # a checkpoint is kept where both intervals meet; the last step is always saved
    kept = math.lcm(run.keep_every, run.checkpoint_every) if run.keep_every and run.checkpoint_every else 0
    candidates: list[tuple[str, Section, str, int | None]] = [
        ("run.checkpoint_every", run, "checkpoint_every", run.checkpoint_every),
        ("run.keep_every", run, "keep_every", kept),
        ("run.snapshot_every", run, "snapshot_every", run.snapshot_every),
        ("evaluation.every", config.evaluation, "every", config.evaluation.every),
        ("monitor.histogram_every", config.monitor, "histogram_every", config.monitor.histogram_every),
        ("monitor.collapse.every", config.monitor.collapse, "every", config.monitor.collapse.every),
        ("monitor.profile.start", config.monitor.profile, "start", config.monitor.profile.start),
        ("objective.gram.refresh.first", gram.refresh, "first", gram.refresh.first if gram.is_active else None),
    ]
    for key, section, name, first in candidates:
        value = getattr(section, name)
        is_chosen = key in changed and value != type(section).model_fields[name].default
        if first and first > steps and is_chosen:
            hint = " (only the last step is saved)" if name == "checkpoint_every" else ""
            hint = f" with run.checkpoint_every {run.checkpoint_every}" if name == "keep_every" else hint
            yield f"{key} {value}{hint}"
    is_chosen = not changed.keys().isdisjoint(("evaluation.best", "evaluation.every"))
    if config.evaluation.best is not None and not 0 < config.evaluation.every <= steps and is_chosen:
        yield f"evaluation.best {config.evaluation.best} (evaluation.every is {config.evaluation.every})"


def _masked_counts(config: Config) -> list[int]:
    patches = config.crops.global_size.patches(config.model.patch_size)
    return group_counts(config.masks, config.crops.global_count, patches)


def _schedules(config: Config) -> Iterator[tuple[str, Schedule]]:
    """Yield the key and the value of every schedule that the run uses."""
    # a feature teacher's targets have no temperature
    unused = {"schedules.teacher_temperature"} if config.teacher.model is not None else set()
    for key, field in walk_settings():
        if field.annotation is Schedule and key not in unused:
            value: object = config
            for name in key.split("."):
                value = getattr(value, name)
            assert isinstance(value, Schedule)
            yield key, value
