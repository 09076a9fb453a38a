"""``streamtrain evaluate segmentation`` and ``depth``: measure frozen patch features on maps of class ids or depth."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from shards.format.pixels import RGB, PixelFormat
from streamtrain.cli.backbone import choose_device, describe_backbone, load_selected_backbone
from streamtrain.cli.feature_quality import Values, check_sizes, select_networks
from streamtrain.data.batch import UNIT_RANGE
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.depth import delta1, estimate_depth, rmse
from streamtrain.evaluation.label_maps import CLASS_IDS, DEPTH, MappedImages, open_mapped, split_mapped
from streamtrain.evaluation.patches import PatchNetwork
from streamtrain.evaluation.segmentation import class_iou, mean_iou, segment
from streamtrain.evaluation.uncertainty import bootstrap, bootstrap_margin
from streamtrain.interop.folder import IMAGENET_MEAN, IMAGENET_STD

# of the pixel baseline on its own
PIXELS_SIZE, PIXELS_PATCH = 224, 16
# classes in the printed table
_MAX_PRINTED = 40
_NAMES = {
    "segmentation": {"linear_miou": "linear probe mIoU", "knn_miou": "kNN mIoU"},
    "depth": {"rmse": "depth RMSE", "delta1": "δ1"},
    "correspondence": {"pck_0.1": "PCK@0.1", "pck_0.05": "PCK@0.05"},
}

Score = Callable[[np.ndarray], np.ndarray]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DenseMeasurement:
    """Scores of a network on test images.

    Attributes:
        sums: of each image [N, ...], and the score of sums over images, by the name of the score.
        images: indices of the N test images.
        facts: numbers of images, pixels and patches, and constants of the classifier.
        values: of single classes, and their pixels.
    """

    sums: dict[str, tuple[np.ndarray, Score]]
    images: tuple[int, ...]
    facts: Values
    values: Values


def evaluate(arguments: argparse.Namespace) -> Values:
    """Measure the selected network; keys are described in docs/evaluation.md.

    Raises:
        StreamtrainError: options, images or maps that cannot be used.
    """
    if arguments.ignore and arguments.task == "depth":
        raise StreamtrainError("--ignore names class ids, for evaluate segmentation")
    arguments, other, pixels = select_networks(arguments)
    train, test = open_sets(arguments, pixels)
    network, background, described = select_network(arguments, pixels)
    measured = measure(arguments.task, network, with_background(train, background), with_background(test, background))
    result: Values = {
        "task": arguments.task,
        **described,
        "size": network.size,
        "patch_size": network.patch_size,
        "train": str(arguments.train),
        "test": str(arguments.test or arguments.train),
        "labels": str(arguments.labels or arguments.train),
        "test_images": len(measured.images),
        **measured.facts,
        **describe_scores(measured),
        **measured.values,
    }
    if other is not None:
        second, background, _ = select_network(other, pixels, like=network)
        compared = measure(other.task, second, with_background(train, background), with_background(test, background))
        if compared.images != measured.images:
            raise StreamtrainError(f"other images were usable for {arguments.compare}; run the command again")
        result |= {"compared_with": arguments.compare, **describe_differences(measured, compared)}
    return result


def open_sets(arguments: argparse.Namespace, pixels: PixelFormat) -> tuple[MappedImages, MappedImages]:
    """Open the train and the test images; without --test, a fifth is held out."""
    kind = CLASS_IDS if arguments.task == "segmentation" else DEPTH
    ignored = tuple(arguments.ignore or ())
    train = open_mapped(arguments.train, arguments.labels, kind, pixels, ignored)
    if arguments.test is None:
        if arguments.test_labels is not None:
            raise StreamtrainError("--test-labels belongs to --test; without it, a fifth of --train is held out")
        return split_mapped(train)
    if arguments.test.resolve() == arguments.train.resolve():
        logger.warning("--test is --train, so the labels of the test images are known; leave out --test")
    test_labels = arguments.test_labels
    if test_labels is None and not (arguments.test / "manifest.json").is_file():
        test_labels = arguments.labels
    return train, open_mapped(arguments.test, test_labels, kind, pixels, ignored)


def with_background(mapped: MappedImages, background: tuple[int, int, int] | None) -> MappedImages:
    return replace(mapped, images=replace(mapped.images, background=background))


def select_network(
    arguments: argparse.Namespace, pixels: PixelFormat, like: PatchNetwork | None = None
) -> tuple[PatchNetwork, tuple[int, int, int] | None, Values]:
    """Return the selected network, the background of its images, and its description.

    Args:
        like: the network that pixels are compared with, whose patches they have.
    """
    device = choose_device(arguments.device)
    if arguments.pixels:
        if arguments.run or arguments.weights or arguments.untrained:
            raise StreamtrainError("--pixels uses no network; remove --run, --weights or --untrained")
        if pixels != RGB:
            raise StreamtrainError(f"--pixels needs 8-bit RGB images, the network takes {pixels}")
        patch = PIXELS_PATCH if like is None else like.patch_size
        size = arguments.size or (PIXELS_SIZE if like is None else like.size)
        resize = arguments.resize or (size if like is None else like.resize)
        check_sizes(size, resize, patch)
        network = PatchNetwork(
            None, patch, size, resize, IMAGENET_MEAN, IMAGENET_STD, UNIT_RANGE, device, arguments.batch
        )
        return network, (255, 255, 255), {"features": "pixels"}
    backbone = load_selected_backbone(arguments)
    config = backbone.config
    size = arguments.size or config.image_size
    resize = arguments.resize or config.resize_for(size)
    check_sizes(size, resize, config.model.patch_size)
    network = PatchNetwork(
        backbone.model.to(device), config.model.patch_size, size, resize, config.mean, config.std, config.value_range,
        device, arguments.batch,
    )  # fmt: skip
    step = config.origin.get("step")
    described: Values = {"features": describe_backbone(arguments)}
    return network, config.background, described | ({"step": step} if isinstance(step, int) else {})


def measure(task: str, network: PatchNetwork, train: MappedImages, test: MappedImages) -> DenseMeasurement:
    """Train and test on the patches of a network."""
    return _segmentation(network, train, test) if task == "segmentation" else _depth(network, train, test)


def _segmentation(network: PatchNetwork, train: MappedImages, test: MappedImages) -> DenseMeasurement:
    found = segment(network, train, test)
    labelled = found.counts["linear"][:, 0]
    classes = np.flatnonzero(labelled.sum(0)).tolist()
    values: Values = {}
    iou = {name: class_iou(counts.sum(0)) for name, counts in found.counts.items()}
    for number in classes:
        values |= {f"{name}_iou_{number}": float(each[number]) for name, each in iou.items()}
        values |= {
            f"pixels_{number}": int(labelled[:, number].sum()),
            f"images_{number}": int((labelled[:, number] > 0).sum()),
        }
    facts: Values = {
        "train_images": found.train_images, "train_pixels": found.train_pixels, "train_patches": found.train_patches,
        "classes": len(classes), "largest_class": float(labelled.sum(0).max() / labelled.sum()),
        "feature_dim": found.feature_dim, "learning_rate": found.learning_rate,
    }  # fmt: skip
    sums: dict[str, tuple[np.ndarray, Score]] = {
        f"{name}_miou": (counts, mean_iou) for name, counts in found.counts.items()
    }
    return DenseMeasurement(sums, found.images, facts, values)


def _depth(network: PatchNetwork, train: MappedImages, test: MappedImages) -> DenseMeasurement:
    found = estimate_depth(network, train, test)
    facts: Values = {
        "train_images": found.train_images, "train_pixels": found.train_pixels,
        "test_pixels": int(found.sums[:, 2].sum()), "feature_dim": found.feature_dim, "penalty": found.penalty,
    }  # fmt: skip
    return DenseMeasurement({"rmse": (found.sums, rmse), "delta1": (found.sums, delta1)}, found.images, facts, {})


def describe_scores(measured: DenseMeasurement) -> Values:
    """Return each score X, ``margin_X``, its ± (95 %), and ``real_difference_X``, a difference that is not chance."""
    values: Values = {}
    for name, (sums, score) in measured.sums.items():
        margin = bootstrap_margin(bootstrap(sums, score))
        values |= {name: float(score(sums.sum(0))), f"margin_{name}": margin}
        values[f"real_difference_{name}"] = math.hypot(margin, margin)
    return values


def describe_differences(measured: DenseMeasurement, other: DenseMeasurement) -> Values:
    """Return by how much each score X exceeds that of another network on the same images, and its ± (95 %)."""
    values: Values = {}
    for name, (sums, score) in measured.sums.items():
        other_sums, _ = other.sums[name]
        values[f"over_{name}"] = float(score(sums.sum(0)) - score(other_sums.sum(0)))
        # both networks have the same draws of images
        values[f"margin_over_{name}"] = bootstrap_margin(bootstrap(sums, score) - bootstrap(other_sums, score))
    return values


def format_result(result: Values) -> str:
    """Return the lines to print: scores, those of each class, the difference beyond chance, and the comparison."""
    task = str(result["task"])
    names = _NAMES[task]
    step = f" at step {result['step']}" if "step" in result and result["features"] != "untrained" else ""
    scores = ", ".join(
        f"{label} {_format(name, result[name])} ± {_format(f'margin_{name}', result[f'margin_{name}'])}"
        for name, label in names.items()
    )
    if task == "correspondence":
        tested = f"{result['test_points']} points of {result['test_pairs']} pairs"
    else:
        tested = f"{result['train_images']} train and {result['test_images']} test images"
    if task == "segmentation":
        tested += f", {result['classes']} classes (the largest has {result['largest_class']:.0%} of the pixels)"
    lines = [
        f"{scores}: {result['features']}{step}, {result['size']} px in patches of {result['patch_size']}, {tested}"
    ]
    if task == "segmentation":
        lines += _class_table(result)
    drawn = "pairs" if task == "correspondence" else "test images"
    least = " and ".join(_format(name, result[f"real_difference_{name}"], "-") for name in names)
    lines.append(
        f"± is a 95% interval, from draws of the {drawn}; two networks differ by more than chance if they are "
        f"{least} apart (--compare NETWORK often needs less)"
    )
    if "compared_with" in result:
        texts = [
            f"{label} {_format(name, over, '+')} ± {_format(f'margin_{name}', margin)} ({_verdict(over, margin, name)})"
            for name, label in names.items()
            for over, margin in [(float(result[f"over_{name}"]), float(result[f"margin_over_{name}"]))]
        ]
        lines.append(f"compared with {result['compared_with']} on the same images: {', '.join(texts)}")
    return "\n".join(lines)


def _class_table(result: Values) -> list[str]:
    numbers = [int(key.removeprefix("pixels_")) for key in result if key.startswith("pixels_")]
    shown = sorted(numbers, key=lambda number: -int(result[f"pixels_{number}"]))[:_MAX_PRINTED]
    lines = ["class  linear IoU  kNN IoU  test pixels  test images"]
    lines += [
        f"{number:5}  {result[f'linear_iou_{number}']:10.1%}  {result[f'knn_iou_{number}']:7.1%}  "
        f"{result[f'pixels_{number}']:11}  {result[f'images_{number}']:11}"
        for number in sorted(shown)
    ]  # fmt: skip
    hidden = len(numbers) - len(shown)
    return [*lines, f"{hidden} classes with fewer pixels are in --json"] if hidden else lines


def _format(name: str, value: object, sign: str = "") -> str:
    """Return a score as text: a share in %, its margin in points; with ``sign`` + or -, a difference in points."""
    number = float(str(value))
    if name.removeprefix("margin_") == "rmse":
        return f"{number:{sign}.3f}"
    if sign or name.startswith("margin_"):
        return f"{100 * number:{sign}.1f}{' points' if sign else ''}"
    return f"{number:.1%}"


def _verdict(over: float, margin: float, name: str) -> str:
    if abs(over) <= margin:
        return "may be chance"
    return "better" if (over > 0) != (name == "rmse") else "worse"
