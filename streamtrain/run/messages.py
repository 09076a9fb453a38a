"""The configuration of a run in one line, and the lines at its end. Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.credentials import strip_from_text
from shards.format.set_manifest import counted
from shards.reading.mixture import AnySet
from shards.reading.shard_set import ShardSet
from streamtrain.config.model import PRESETS, ModelConfig
from streamtrain.config.tree import Config
from streamtrain.run.directory import METRICS_NAME, TENSORBOARD_NAME, step_folder
from streamtrain.run.tags import HEADLINES


def configuration_line(config: Config, recipe: str, num_images: int, world_size: int, device: str) -> str:
    """Return the configuration of a run in one line.

    Args:
        recipe: the ``--config`` of the command.
        num_images: in ``data.shards``.
        device: ``cuda`` or ``cpu``.
    """
    global_batch, accumulation = config.batch_split(world_size)
    kind = "GPU" if device == "cuda" else "CPU rank"
    ranks = f"{world_size} {kind}{'s' if world_size > 1 else ''}"
    factors = [str(config.data.micro_batch)]
    factors += [f"{world_size} ranks"] if world_size > 1 else []
    factors += [f"{accumulation} micro-batches"] if accumulation > 1 else []
    batch = f"batch {global_batch}" + (f" = {' x '.join(factors)}" if len(factors) > 1 else "")
    factor, peak = config.optim.lr_factor(global_batch), config.schedules.lr.peak
    lr = f"lr {peak * factor:.3g}" + (f" ({peak:.3g} scaled to the batch)" if factor != 1 else "")
    return (
        f"{recipe}: {network_name(config.model)}; {num_images:,} images in {config.data.shards_text}; {batch}; {lr}; "
        f"{config.run.steps} steps on {ranks}; run directory {config.run.dir}"
    )


def network_name(model: ModelConfig) -> str:
    """Return the preset, or the size of a network that no preset has."""
    preset = model.preset
    if preset is not None and all(getattr(model, key) == value for key, value in PRESETS[preset].items()):
        return preset
    return f"ViT of width {model.dim} and depth {model.depth}"


def labelled_set(config: Config, shard_set: AnySet) -> str | None:
    """Return the path of labelled images to evaluate with: those of ``evaluation``, or the set itself; else None."""
    if config.evaluation.train is not None:
        return config.evaluation.train
    is_labelled = isinstance(shard_set, ShardSet) and not shard_set.is_remote and len(shard_set.manifest.classes) > 1
    return config.data.shards_text if is_labelled else None


def describe_drift(metrics: Mapping[str, float]) -> str | None:
    """Return in one line how far the metrics of an evaluation are from the start; None if that is not among them."""
    parts = []
    for name, prefix, drift in (("", "eval/", "drift/"), ("reference: ", "reference/", "drift/reference/")):
        texts = [
            f"{HEADLINES[f'eval/{metric}']} {metrics[prefix + metric] - metrics[drift + metric]:.1%} → "
            f"{metrics[prefix + metric]:.1%}"
            for metric in ("knn_20", "patch_retrieval")
            if prefix + metric in metrics and drift + metric in metrics
        ]
        for metric, title in (("cka", "CKA"), ("distance", "distance")):
            texts += [f"{title} {metrics[drift + metric]:.3f}"] if drift + metric in metrics else []
        parts += [f"{name}{', '.join(texts)}"] if texts else []
    return f"from the start to the last evaluation: {'; '.join(parts)}" if parts else None


def completed_text(
    config: Config, steps: int, step_time: str, total_time: str, labelled: str | None, drift: str | None = None,
    health: str | None = None,
) -> str:  # fmt: skip
    """Return where the results of a complete run are, and commands that use them.

    Args:
        steps: completed since this start.
        step_time: sum of their durations, which the report shows for all starts together.
        total_time: duration of this start.
        labelled: path of a set to evaluate with; None: there is no such set.
        drift: of ``describe_drift``.
        health: the verdict on the run's metrics.
    """
    run_dir = Path(config.run.dir)
    commands = [["evaluate", "knn", "--run", run_dir, "--train", labelled]] if labelled is not None else []
    commands += [
        ["report", "--run", run_dir],
        ["export", "--run", run_dir, "--to", "hf", "--out", "exported"],
    ]
    lines = [
        f"completed {counted(config.run.steps, 'step')}; this start: {steps:,} in {step_time}, {total_time} in all",
        f"results in {run_dir}: {step_folder('', config.run.steps)}, {METRICS_NAME}, {TENSORBOARD_NAME}/",
        *(line for line in (drift, health) if line is not None),
        "next:",
        *(f"  {command_text(words)}" for words in commands),
    ]
    return "\n".join(lines)


def command_text(words: Sequence[object]) -> str:
    """Return a ``streamtrain`` command that can be pasted into a shell."""
    return shlex.join(["streamtrain", *map(str, words)])


def typed_command(words: Sequence[str]) -> str:
    """Return the command line that the user typed, without the credentials of URLs."""
    return command_text([strip_from_text(word) for word in words])
