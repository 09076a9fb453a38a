"""The labelled images for evaluation while training; torch-free, so that a wrong path is reported at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from shards.format.decode import WHITE, Color
from shards.format.set_manifest import FILE_NAME, SetManifest
from shards.randomness import uniforms
from shards.reading.mixture import AnySet, JoinedSet
from shards.reading.shard_set import ShardSet
from streamtrain.config.evaluation import DENSE
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.images import (
    LabelledImages,
    UnusableImages,
    images_of_set,
    match_classes,
    open_images,
    open_source,
    split_images,
)

TRAIN_PER_TEST = 4
# images that are decoded at the start, to report early that a folder has images of other channels than the network
_NUM_TRIED = 4
_PURPOSE = "evaluation/held out"


@dataclass(frozen=True)
class HeldOut:
    """Images for evaluation: a train and a test set."""

    train: LabelledImages
    test: LabelledImages
    # False: all labels are 0
    is_labelled: bool = True

    @cached_property
    def digest(self) -> str:
        """Text that changes with the images, their order or their labels; reads them once."""
        return f"{self.train.digest()} {self.test.digest()}"


def held_out(config: Config, shard_set: AnySet) -> tuple[HeldOut | None, str]:
    """Return the images that ``evaluation`` selects, or None, and the reason why they or their labels are not used.

    Raises:
        ShardError, StreamtrainError: if a named set is missing or has no labels.
    """
    evaluation, background = config.evaluation, config.data.background_color
    # train and test images
    count = evaluation.images + evaluation.images // TRAIN_PER_TEST
    if evaluation.train is not None:
        needs_labels = not _measures_maps(config, evaluation.train)
        train = _open(config, evaluation.train, needs_labels)
        why_not = "" if needs_labels else _why_unlabelled(train, evaluation.train)
        if evaluation.test is not None:
            test = _open(config, evaluation.test, not why_not)
            if not why_not:
                test = match_classes(train, test)
            parts = sample_images(train, evaluation.images), sample_images(test, evaluation.images // TRAIN_PER_TEST)
        else:
            parts = split_images(sample_images(train, count))
        return _held_out(parts, not why_not), why_not
    if isinstance(shard_set, JoinedSet) or shard_set.is_remote:
        return None, "data.shards is not one local set"
    images = images_of_set(shard_set, stratified_indices(shard_set.num_samples, count))
    images = replace(images, background=background)
    if len(images) <= TRAIN_PER_TEST:
        return None, "data.shards has too few images"
    why_not = _why_unlabelled(images, "data.shards")
    if why_not and not _measures_maps(config, str(shard_set.path)):
        return None, why_not
    return _held_out(split_images(images), not why_not), why_not


def _why_unlabelled(images: LabelledImages, name: str) -> str:
    """Return why images cannot be classified; empty if all have a label, of at least two classes."""
    if (images.labels < 0).all():
        return f"{name} has no labels"
    if (images.labels < 0).any():
        return f"some images of {name} have no label"
    return "" if len(set(images.labels.tolist())) > 1 else f"all images of {name} have the same label"


def _measures_maps(config: Config, path: str) -> bool:
    """Return whether a set has maps that an evaluator measures, so that it needs no labels.

    ``evaluation.stop_if_below`` needs labels.
    """
    evaluation = config.evaluation
    kinds = {kind for name, kind in DENSE.items() if name in evaluation.evaluators}
    if evaluation.stop_if_below is not None or not kinds or not (Path(path) / FILE_NAME).is_file():
        return False
    return not kinds.isdisjoint(SetManifest.load(path).maps)


def _held_out(parts: tuple[LabelledImages, LabelledImages], is_labelled: bool) -> HeldOut:
    if is_labelled:
        return HeldOut(*parts)
    train, test = (replace(part, labels=np.zeros_like(part.labels)) for part in parts)
    return HeldOut(train, test, is_labelled=False)


def _open(config: Config, path: str, needs_labels: bool = True) -> LabelledImages:
    background, pixels = config.data.background_color, config.data.pixels
    images = open_images(Path(path), background, pixels) if needs_labels else open_source(path, background, pixels)
    images.require_pixels(pixels)
    indices = stratified_indices(len(images), _NUM_TRIED)
    tried = replace(images.subset(indices, images.name), unusable=UnusableImages())
    if len(tried) and all(tried.decode_if_usable(index) is None for index in range(len(tried))):
        reasons = tried.unusable.new_reasons()
        raise StreamtrainError(f"none of {len(tried)} images of {path} that were tried can be used: {reasons}")
    return images


def check_stop_has_labels(config: Config, why_not: str) -> None:
    """Raise StreamtrainError if ``evaluation.stop_if_below`` has no labelled images; ``why_not``: of ``held_out``."""
    if why_not and config.evaluation.stop_if_below is not None and config.evaluation.reference is None:
        raise StreamtrainError(
            f"evaluation.stop_if_below needs labelled images, and {why_not}; set evaluation.train or "
            "evaluation.reference to a labelled set, or evaluation.stop_if_below=null"
        )


def reference_images(config: Config) -> HeldOut | None:
    """Return the images of ``evaluation.reference``, None without a reference or without evaluations.

    Raises:
        ShardError, StreamtrainError: if the set is missing, too small, or has too few labels for ``stop_if_below``.
    """
    evaluation = config.evaluation
    if evaluation.reference is None or not evaluation.every:
        return None
    images = _open(config, evaluation.reference, needs_labels=False)
    images = sample_images(images, evaluation.images + evaluation.images // TRAIN_PER_TEST)
    is_labelled = not _why_unlabelled(images, "evaluation.reference")
    if not is_labelled and evaluation.stop_if_below is not None:
        raise StreamtrainError(
            f"evaluation.stop_if_below needs labels, and evaluation.reference {evaluation.reference} has none, or only "
            "one class; give a labelled set, or evaluation.stop_if_below=null"
        )
    return _held_out(split_images(images), is_labelled)


def first_images(shard_set: AnySet, count: int, background: Color | None = WHITE) -> LabelledImages:
    """Return ``count`` images of a set, or of the first of several sets, labelled or not."""
    one: ShardSet = shard_set.members[0] if isinstance(shard_set, JoinedSet) else shard_set
    return replace(images_of_set(one, stratified_indices(one.num_samples, count)), background=background)


def sample_images(images: LabelledImages, count: int) -> LabelledImages:
    """Return at most ``count`` of the images, evenly spread."""
    return images if len(images) <= count else images.subset(stratified_indices(len(images), count), images.name)


def stratified_indices(total: int, count: int) -> np.ndarray:
    """Return at most ``count`` ascending indices below ``total``, int64: one random index per stratum."""
    if total <= count:
        return np.arange(total)
    draws = uniforms(0, _PURPOSE, np.arange(count), 1)[:, 0]
    return np.unique(np.minimum(((np.arange(count) + draws) * (total / count)).astype(np.int64), total - 1))
