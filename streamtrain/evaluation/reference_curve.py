"""Stored curves of healthy runs of shipped recipes, for comparison in the report. Torch-free.

Each file of ``reference_curves`` has the curves of one recipe; ``tools/bench.py reference`` writes it from a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shards.format.files import read_json
from streamtrain.config.load import build
from streamtrain.config.recipes import changed_settings, nearest_recipe, read_recipe
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.figures import Line, read_lines
from streamtrain.evaluation.health import judge_health
from streamtrain.evaluation.verdict import KnownBaselines

FOLDER = Path(__file__).with_name("reference_curves")
# values of a stored curve, and their significant digits
MAX_POINTS, _DIGITS = 40, 4
# with more changed settings, a run has a recipe of its own
MAX_CHANGED = 15
# speed and memory belong to a machine, and the statistics of pixels to the images
_GROUPS = ("loss", "eval", "reference", "drift", "features", "teacher", "optim")
_LEFT_OUT = ("optim/skipped_steps", "eval/seconds", "eval/time_share", "eval/unusable_images")
_LOSSES = ("objective.", "teacher.kind", "schedules.teacher_temperature.")
# settings that decide the range of a tag's values, by the beginning of the tag
_RANGES = {
    "loss/": _LOSSES,
    "teacher/": _LOSSES,
    "optim/gradient_norm": (*_LOSSES, "model."),
    "features/rank": ("model.dim", "data.micro_batch", "data.global_batch", "monitor.collapse.images"),
}
# accuracies depend on the images, and so do their changes since the start
_ACCURACIES = ("knn_", "linear", "patch_retrieval")


@dataclass(frozen=True)
class ReferenceCurves:
    """Curves of a healthy run; content of a file of ``reference_curves``.

    Attributes:
        recipe: file name of the shipped recipe; ``settings`` are the changed ones by dotted key.
        steps, seed: of the run.
        images: description of its images; ``identities`` are the digests of its evaluation images by set.
        curves: steps and values by tag; values between two points are averaged.
        command, commit, versions, device: of the run.
    """

    recipe: str
    settings: Mapping[str, Any]
    steps: int
    seed: int
    images: str
    identities: Mapping[str, str]
    command: str
    commit: str | None
    versions: Mapping[str, str]
    device: str
    curves: Mapping[str, Sequence[Sequence[float]]]

    @cached_property
    def config(self) -> Config:
        """The run's configuration, without paths; raises ConfigError if today's version does not accept it."""
        raw = read_recipe(self.recipe).model_dump(mode="json")
        for key, value in self.settings.items():
            *sections, name = key.split(".")
            section = raw
            for each in sections:
                section = section[each]
            section[name] = value
        return build(raw)


@dataclass(frozen=True)
class Comparison:
    """The stored run with the recipe of a run, and the settings in which this run differs from it."""

    reference: ReferenceCurves
    steps: int
    changed: Mapping[str, Any]
    has_same_images: bool

    def line(self, tag: str) -> Line | None:
        """Return the stored curve over the steps of this run; None if there is none, or its range would differ."""
        if tag not in self.reference.curves or self._left_out(tag):
            return None
        steps, values = np.array(self.reference.curves[tag], np.float64)
        return Line("", steps * (self.steps / self.reference.steps), values)

    def _left_out(self, tag: str) -> bool:
        keys = next((keys for start, keys in _RANGES.items() if tag.startswith(start)), ())
        is_other = any(key.startswith(keys) for key in self.changed) if keys else False
        is_accuracy = tag.rpartition("/")[2].startswith(_ACCURACIES)
        return is_other or (is_accuracy and not self.has_same_images)

    def caption(self, tags: Sequence[str]) -> str:
        """Return a sentence or two about the grey curves, if this run logged ``tags``; else the empty string."""
        reference = self.reference
        common = [tag for tag in tags if tag in reference.curves]
        if all(map(self._left_out, common)):
            return ""
        text = f"Grey: a healthy run of {reference.recipe}, {reference.steps:,} steps on {reference.images}"
        if self.steps != reference.steps:
            text += f", as a share of its steps (this run has {self.steps:,})"
        if missing := [tag for tag in common if self._left_out(tag)]:
            names = ", ".join(sorted({tag.partition("/")[0] for tag in missing}))
            text += f". Some curves of {names} have no grey one: other images or settings give them another range"
        return f"{text}."


def stored_curves() -> list[Path]:
    """Return the stored files, in order."""
    return sorted(FOLDER.glob("*.json"))


def read_curves(path: Path) -> ReferenceCurves:
    """Read a stored file, which is part of the package.

    Raises:
        OSError, ValueError, TypeError: it is missing or damaged.
    """
    return ReferenceCurves(**read_json(path))


def find_comparison(config: Config, baselines: KnownBaselines) -> Comparison | None:
    """Return the stored run whose recipe a run has; None without one."""
    recipe, changed = nearest_recipe(config)
    found = []
    for path in stored_curves():
        reference = read_curves(path)
        other = changed_settings(config, reference.config)
        is_of_recipe = reference.recipe == recipe and len(changed) <= MAX_CHANGED
        if is_of_recipe or len(other) <= MAX_CHANGED:
            has_same_images = bool(baselines.images) and dict(baselines.images) == dict(reference.identities)
            found.append(Comparison(reference, config.run.steps, other, has_same_images))
    return min(found, key=lambda each: len(each.changed), default=None)


def describe_curves(
    records: Sequence[Mapping[str, Any]], config: Config, environment: Mapping[str, Any], baselines: KnownBaselines,
    images: str, recipe: str | None = None,
) -> ReferenceCurves:  # fmt: skip
    """Return the curves of a completed healthy run.

    Args:
        records: of ``metrics.jsonl``.
        environment: content of ``environment.json``.
        images: words for the images, as in "2,400 drawn images".
        recipe: file name of the shipped recipe; default: the closest one.

    Raises:
        StreamtrainError: if the run is not complete or not healthy, or there is no such recipe.
    """
    if not records or records[-1]["step"] < config.run.steps:
        raise StreamtrainError(f"the run is not complete: it needs {config.run.steps} steps")
    if (finding := judge_health(records, config)).kind != "good":
        raise StreamtrainError(f"the run is not healthy: {finding.title}. {finding.text}")
    recipe = recipe or nearest_recipe(config)[0]
    settings = changed_settings(config, read_recipe(recipe))
    # JSON has lists for tuples
    settings = json.loads(json.dumps(settings))
    given = " ".join(f"'{key}={json.dumps(value)}'" for key, value in settings.items())
    tags = sorted({tag for record in records for tag in record if tag.partition("/")[0] in _GROUPS} - {*_LEFT_OUT})
    curves = {}
    for tag in tags:
        (line,) = read_lines({"": records}, tag)
        start = baselines.start.get(tag)
        if start is not None:
            line = Line("", np.append(float(baselines.step), line.steps), np.append(start, line.values))
        if len(line.steps):
            curves[tag] = [_round(mean) for mean in _means(line)]
    return ReferenceCurves(
        recipe, settings, config.run.steps, config.run.seed, images, baselines.images,
        f"streamtrain train --config {recipe} {given}".rstrip(), environment.get("commit"),
        environment.get("program", {}), str(environment.get("device", "cpu")), curves,
    )  # fmt: skip


def _means(line: Line) -> list[np.ndarray]:
    """Return at most ``MAX_POINTS`` steps and values: means of equally many points, but the first and the last."""
    count = len(line.steps)
    if count <= MAX_POINTS:
        return [line.steps, line.values]
    pieces = [slice(0, 1), *_slices(1, count - 1, MAX_POINTS - 2), slice(count - 1, count)]
    return [np.array([part[piece].mean() for piece in pieces]) for part in (line.steps, line.values)]


def _slices(first: int, last: int, count: int) -> list[slice]:
    bounds = np.linspace(first, last, count + 1).astype(int).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def _round(values: np.ndarray) -> list[float]:
    rounded = [float(f"{value:.{_DIGITS}g}") for value in values.tolist()]
    return [int(value) if value == math.floor(value) and abs(value) < 1e15 else value for value in rounded]
