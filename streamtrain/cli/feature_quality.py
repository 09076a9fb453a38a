"""``streamtrain evaluate``: compute the features of labelled images and measure a classifier on them."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shards.errors import printable
from shards.format.pixels import RGB, PixelFormat
from streamtrain.cli.backbone import choose_device, describe_backbone, load_selected_backbone, selected_pixels
from streamtrain.cli.evaluate import BASELINES, MAX_IMAGES_FOR_SPLITS
from streamtrain.config.load import RESOLVED_NAME
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.feature_cache import cached_features
from streamtrain.evaluation.features import compute_features, pixel_features, read_pixels, report_unusable
from streamtrain.evaluation.images import LabelledImages, match_classes, open_images, split_indices
from streamtrain.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn_predict
from streamtrain.evaluation.linear import EPOCHS, linear_accuracy
from streamtrain.evaluation.logistic import PENALTIES, logistic_accuracy, require_scikit_learn
from streamtrain.evaluation.uncertainty import accuracy_margin, difference_margin, paired_difference
from streamtrain.interop.folder import IMAGENET_MEAN, IMAGENET_STD
from streamtrain.interop.load import needs_factory
from streamtrain.run.progress import progress_bar

# default input size of the pixel baseline
PIXELS_SIZE = 32

Values = dict[str, str | int | float]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedded:
    """Features of all images of a set: fp32 [N, D], and bool [N]: False where an image is unusable."""

    features: Tensor
    is_usable: Tensor


@dataclass(frozen=True)
class Rows:
    """Features fp32 [N, D] and labels int64 [N]."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Measurement:
    """A classifier, trained and tested once.

    Attributes:
        is_right: bool [M] by the name of an accuracy: which test images were predicted correctly.
        chosen: constants of the classifier.
    """

    is_right: dict[str, np.ndarray]
    chosen: Values


def evaluate(arguments: argparse.Namespace) -> Values:
    if arguments.task == "logistic":
        # before the features of many images are computed
        require_scikit_learn()
    arguments, other, pixels = select_networks(arguments)
    sets = open_sets(arguments.train, arguments.test, pixels)
    began = time.perf_counter()
    source, embedded = features_of(arguments, sets)
    seconds = time.perf_counter() - began
    splits = split_rows(arguments.task, sets, embedded)
    train, test = splits[0]
    result: Values = {
        "task": arguments.task,
        **source,
        "train": str(arguments.train),
        "test": str(arguments.test or arguments.train),
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "classes": len(set(train.labels.tolist())),
        # the accuracy of a classifier that names the commonest class for every image
        "largest_class": max(Counter(test.labels.tolist()).values()) / len(test.labels),
        "feature_dim": train.features.shape[1],
        "feature_seconds": round(seconds, 3),
    }
    measured = measure(arguments.task, splits)
    result |= measured[0].chosen | describe_accuracies(measured)
    if arguments.test is None:
        result["splits"] = len(measured)
    if other is not None:
        _, other_embedded = features_of(other, sets)
        if any(
            not torch.equal(one.is_usable, two.is_usable) for one, two in zip(embedded, other_embedded, strict=True)
        ):
            raise StreamtrainError(f"other images were unusable for {arguments.compare}; run the command again")
        others = measure(arguments.task, split_rows(arguments.task, sets, other_embedded))
        result |= {"compared_with": arguments.compare} | describe_differences(measured, others)
    return result


def select_networks(
    arguments: argparse.Namespace,
) -> tuple[argparse.Namespace, argparse.Namespace | None, PixelFormat]:
    """Return the arguments that select the network, and that of ``--compare`` if there is one, and their pixels.

    Raises:
        StreamtrainError: the options of ``--compare`` do not fit, or the networks take different images.
    """
    other = select_baseline(arguments, arguments.compare) if arguments.compare is not None else None
    if other is not None:
        arguments, other = share_factory(arguments, other)
    if arguments.compare == "untrained" and not arguments.untrained:
        # it describes only that network
        arguments = argparse.Namespace(**{**vars(arguments), "config": None})
    pixels = selected_pixels(arguments)
    if other is not None and (needed := selected_pixels(other)) != pixels:
        raise StreamtrainError(f"--compare {arguments.compare} needs images of {needed}, the network has {pixels}")
    return arguments, other, pixels


def open_sets(train: Path, test: Path | None, pixels: PixelFormat) -> list[LabelledImages]:
    """Open the train and the test set; without a test set, only the one that will be split.

    Args:
        pixels: channels and dtype that the network takes.

    Raises:
        StreamtrainError: they cannot be used, or all images have the same label.
    """
    opened = open_images(train, pixels=pixels)
    if len(np.unique(opened.labels)) < 2:
        raise StreamtrainError(f"all images of {printable(train)} have the same label; give images of several classes")
    if test is not None and test.resolve() == train.resolve():
        logger.warning(
            "--test is --train, so the labels of the test images are known; leave out --test to hold out "
            "a fifth of the images"
        )
    if test is not None:
        return [opened, match_classes(opened, open_images(test, pixels=pixels))]
    # refuse too few images before the features of any are computed
    split_indices(opened)
    return [opened]


def select_baseline(arguments: argparse.Namespace, name: str) -> argparse.Namespace:
    """Return the arguments that select the network of ``--compare``."""
    changed = {**vars(arguments), "pixels": False, "untrained": False, "step": None, "student": False}
    if name == "pixels":
        changed |= {"pixels": True, "run": None, "weights": None, "config": None, "size": None, "resize": None}
    elif name == "untrained":
        if arguments.run is None and arguments.config is None:
            raise StreamtrainError("--compare untrained needs the settings of a network: give --run, or --config")
        # a recipe names its own factory
        changed |= {"untrained": True, "weights": None, "factory": arguments.factory if arguments.run else None}
    else:
        path = Path(name)
        if not path.exists():
            raise StreamtrainError(
                f"--compare {name} is neither {', '.join(BASELINES)}, nor a run directory or weights"
            )
        is_run = (path / RESOLVED_NAME).is_file()
        changed |= {"run": path if is_run else None, "weights": None if is_run else path, "config": None}
    return argparse.Namespace(**changed)


def share_factory(one: argparse.Namespace, two: argparse.Namespace) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Return the arguments of two networks, with ``--factory`` only if the network was trained with one.

    If neither was, both keep it, and loading them reports that.
    """
    paths = [each.run or each.weights for each in (one, two)]
    need = [one.factory is not None and path is not None and needs_factory(path) for path in paths]
    if not any(need):
        return one, two
    first, second = (
        argparse.Namespace(**{**vars(one_of), "factory": one.factory if needed else None})
        for one_of, needed in zip((one, two), need, strict=True)
    )
    return first, second


def features_of(arguments: argparse.Namespace, sets: Sequence[LabelledImages]) -> tuple[Values, list[Embedded]]:
    """Return a description of the features, and the features of all images of each set."""
    device = choose_device(arguments.device)
    if arguments.pixels:
        return pixels_of(arguments, sets)
    backbone = load_selected_backbone(arguments)
    config = backbone.config
    size = arguments.size or config.image_size
    resize = arguments.resize or config.resize_for(size)
    check_sizes(size, resize, config.model.patch_size)
    model = backbone.model.to(device)
    settings = config.model_dump(mode="json", exclude={"origin", "image_size"}) | {
        "size": size,
        "resize": resize,
    }

    def compute(images: LabelledImages) -> tuple[Tensor, Tensor]:
        return compute_features(
            model, replace(images, background=config.background), size=size, mean=config.mean, std=config.std,
            value_range=config.value_range, resize=resize,
            batch_size=arguments.batch or default_batch(size // config.model.patch_size), progress=True,
        )  # fmt: skip

    embedded = []
    for images in sets:
        images.require_pixels(config.pixels)
        features, is_usable, is_cached = cached_features(images, model, settings, compute, not arguments.no_cache)
        show_cached(images, is_cached)
        report_unusable(images, is_usable)
        embedded.append(Embedded(features, is_usable))
    step = config.origin.get("step")
    described: Values = {"features": describe_backbone(arguments), "size": size}
    return described | ({"step": step} if isinstance(step, int) else {}), embedded


def pixels_of(arguments: argparse.Namespace, sets: Sequence[LabelledImages]) -> tuple[Values, list[Embedded]]:
    """Return what ``features_of`` returns, for the normalised pixels."""
    if arguments.run or arguments.weights or arguments.untrained:
        raise StreamtrainError("--pixels uses no network; remove --run, --weights or --untrained")
    size, resize = arguments.size or PIXELS_SIZE, arguments.resize
    check_sizes(size, resize, 1)
    embedded = []
    for images in sets:
        images.require_pixels(RGB)
        pixels, is_usable, is_cached = cached_features(
            images, None, {"size": size, "resize": resize or size, "background": images.background},
            lambda images: read_pixels(images, size=size, resize=resize, progress=True), not arguments.no_cache,
        )  # fmt: skip
        show_cached(images, is_cached)
        report_unusable(images, is_usable)
        embedded.append(Embedded(pixel_features(pixels, IMAGENET_MEAN, IMAGENET_STD), is_usable))
    return {"features": "pixels", "size": size}, embedded


def show_cached(images: LabelledImages, is_cached: bool) -> None:
    if is_cached:
        # to stderr, in place of the progress bar
        tqdm.write(printable(f"features of {images.name}: from the cache; --no-cache computes them again"), sys.stderr)


def split_rows(task: str, sets: Sequence[LabelledImages], embedded: Sequence[Embedded]) -> list[tuple[Rows, Rows]]:
    """Return train and test rows; several splits of a set that has no test set, if testing them takes seconds."""
    labels = [torch.from_numpy(images.labels) for images in sets]
    if len(sets) == 2:
        train, test = (select_rows(*both, np.arange(len(both[1]))) for both in zip(embedded, labels, strict=True))
        return [(train, test)]
    splits = split_indices(sets[0])
    chosen = splits if len(sets[0]) <= MAX_IMAGES_FOR_SPLITS[task] else splits[:1]
    return [
        (select_rows(embedded[0], labels[0], train), select_rows(embedded[0], labels[0], test))
        for train, test in chosen
    ]  # fmt: skip


def select_rows(embedded: Embedded, labels: Tensor, indices: np.ndarray) -> Rows:
    rows = torch.from_numpy(indices)
    rows = rows[embedded.is_usable[rows]]
    return Rows(embedded.features[rows], labels[rows])


def measure(task: str, splits: Sequence[tuple[Rows, Rows]]) -> list[Measurement]:
    """Train and test a classifier on each split; only the first is returned if another one cannot be used."""
    if task == "knn":
        label, total, unit = "searching neighbours", sum(len(test.labels) for _, test in splits), "images"
    elif task == "linear":
        label, total, unit = "linear probe", EPOCHS * len(splits), "epochs"
    else:
        label, total, unit = "logistic regression", (len(PENALTIES) + 1) * len(splits), "fits"
    measured: list[Measurement] = []
    with progress_bar(label, total, unit) as bar:
        for train, test in splits:
            try:
                measured.append(measure_split(task, train, test, bar))
            except StreamtrainError:
                # one class only is left to learn from
                if not measured:
                    raise
                return measured[:1]
    return measured


def measure_split(task: str, train: Rows, test: Rows, bar: tqdm) -> Measurement:
    tensors = train.features, train.labels, test.features
    if task == "knn":
        guesses = knn_predict(*tensors, report=bar.update)
        right = {f"knn_{count}": (guesses[count] == test.labels).numpy() for count in NEIGHBOURS}
        return Measurement(right, {"temperature": TEMPERATURE})
    done = bar.n

    def report(steps: int) -> None:
        bar.update(done + steps - bar.n)

    if task == "logistic":
        regression = logistic_accuracy(*tensors, test.labels, report=report)
        return Measurement({"logistic": regression.is_right}, {"penalty": regression.penalty})
    probe = linear_accuracy(*tensors, test.labels, report=report)
    return Measurement({"linear": probe.is_right.numpy()}, {"learning_rate": probe.learning_rate})


def describe_accuracies(measured: Sequence[Measurement]) -> Values:
    """Return each accuracy on the first split with its ±, those of all splits, and the difference that counts.

    All are shares: ``margin_X`` is the ± (95 %) of X; of several splits, ``mean_X`` tests every image once,
    ``margin_mean_X`` is its ± and ``spread_X`` the standard deviation between splits. ``real_difference_X`` is the
    smallest difference to another network on the same images that is not chance.
    """
    values: Values = {}
    for name, first in measured[0].is_right.items():
        accuracy, count = float(first.mean()), len(first)
        values |= {name: accuracy, f"margin_{name}": accuracy_margin(accuracy, count)}
        if len(measured) > 1:
            every = np.concatenate([one.is_right[name] for one in measured])
            accuracy, count = float(every.mean()), len(every)
            values |= {f"mean_{name}": accuracy, f"margin_mean_{name}": accuracy_margin(accuracy, count)}
            values[f"spread_{name}"] = float(np.std([one.is_right[name].mean() for one in measured], ddof=1))
        values[f"real_difference_{name}"] = difference_margin(accuracy, accuracy, count)
    return values


def describe_differences(measured: Sequence[Measurement], others: Sequence[Measurement]) -> Values:
    """Return by how much each accuracy X exceeds that of another network on the same images, and its ± (95 %)."""
    values: Values = {}
    for name in measured[0].is_right:
        one, two = (np.concatenate([each.is_right[name] for each in pair]) for pair in (measured, others))
        difference, margin = paired_difference(one, two)
        values |= {f"over_{name}": difference, f"margin_over_{name}": margin}
    return values


def default_batch(patches: int) -> int:
    """Return how many images to pass through the network at a time, given the patches along a side.

    Small images in small batches leave the cores waiting for each other.
    """
    return min(max(64, 16_384 // patches**2), 512)


def check_sizes(size: int, resize: int | None, patch: int) -> None:
    """Raise StreamtrainError unless ``size`` is a multiple of ``patch``, and ``resize`` not smaller."""
    if size < 1 or size % patch:
        raise StreamtrainError(f"--size {size} is not a multiple of the patch size {patch}")
    if resize is not None and resize < size:
        raise StreamtrainError(f"--resize {resize} is smaller than the input of {size} pixels")
