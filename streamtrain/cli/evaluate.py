"""``streamtrain evaluate``: measure how well frozen features show classes, depth, or corresponding points."""

from __future__ import annotations

import argparse
import json
from typing import Any

from streamtrain.cli.arguments import add_command, non_negative_int, positive_int
from streamtrain.cli.backbone import add_backbone_arguments, add_device_argument
from streamtrain.errors import StreamtrainError
from streamtrain.run.command_line import local_path

# on features of whole images, and of patches
TASKS = ("knn", "linear", "logistic")
DENSE_TASKS = ("segmentation", "depth")
PAIR_TASKS = ("correspondence",)

# networks of --compare that have a name
BASELINES = ("pixels", "untrained")
# above these numbers of images only one split is tested: five take too long
MAX_IMAGES_FOR_SPLITS = {"knn": 30_000, "linear": 5_000, "logistic": 1_000}

_SUMMARY = "Measure frozen features: classes of images, segmentation, depth, correspondence."
_DETAILS = """\
  knn, linear, logistic   accuracy of kNN, a linear probe or logistic regression on the CLS token
  segmentation            mIoU of a linear probe and of kNN on patch tokens
  depth                   RMSE and delta1 of a linear head on patch tokens
  correspondence          share of points of an image that patch tokens find in another image (PCK), without
                          training

SET is a shard set, or a folder with one subfolder per class. Without --test, a fixed fifth of --train is
held out for testing. The split is the same for every network and every run. If the set is small enough, all
five splits are also tested, so that every image is tested once.

Every accuracy is printed with its 95% interval (±). The output also states how large a difference to another
network must be to be more than chance. --compare tests the difference image by image, which needs fewer images.

For segmentation and depth, SET is a shard set that was packed with maps (--seg, --depth). It can also be a
folder of images, searched recursively. Then --labels is a folder with a file of the same name for each image:
  class ids  .png, grey of 8 or 16 bits or with a palette; 255 or 65535 means unlabelled
  depth      .npy, float32 [height, width], or .png of 16 bits in millimetres

For correspondence, --pairs is a file with one JSON object per line:
  image_a, image_b    paths relative to the file
  points_a, points_b  lists of [x, y] in pixels
  box_b               [left, top, right, bottom] of the object in image_b; optional

--size is then the shorter side, by default at least twice the training size.

Features of whole images are cached in ~/.cache/streamtrain (or XDG_CACHE_HOME), at most 4 GiB. Another task on
the same images with the same weights reuses them.
"""
_EXAMPLES = """\
  streamtrain evaluate knn --run runs/photos --train sets/train --test sets/test --json
  streamtrain evaluate knn --run runs/photos --train sets/train --compare untrained
  streamtrain evaluate linear --weights exported --train sets/train --test sets/test
  streamtrain evaluate logistic --run runs/photos --step best --train sets/train
  streamtrain evaluate knn --pixels --train sets/train
  streamtrain evaluate segmentation --run runs/photos --train photos --labels masks --compare untrained
  streamtrain evaluate depth --run runs/photos --train train --labels train-depth --test test --test-labels test-depth
  streamtrain evaluate correspondence --run runs/photos --pairs pairs.jsonl --compare untrained
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "evaluate", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("task", choices=TASKS + DENSE_TASKS + PAIR_TASKS)
    add_backbone_arguments(parser)
    parser.add_argument("--pixels", action="store_true", help="use the pixels as features, without a network")
    parser.add_argument("--train", type=local_path, metavar="SET", help="labelled images to learn from")
    parser.add_argument("--test", type=local_path, metavar="SET", help="labelled images to predict")
    parser.add_argument(
        "--labels", type=local_path, metavar="DIR", help="segmentation, depth: maps of --train, if it is a folder"
    )
    parser.add_argument(
        "--test-labels",
        type=local_path,
        metavar="DIR",
        help="segmentation, depth: maps of --test (default: as --labels)",
    )
    parser.add_argument(
        "--ignore", type=non_negative_int, nargs="+", metavar="ID", help="segmentation: ids that count as unlabelled"
    )
    parser.add_argument("--pairs", type=local_path, metavar="FILE", help="correspondence: pairs of images, as above")
    parser.add_argument(
        "--compare", type=parse_network, metavar="NETWORK",
        help="also test the difference to another network: pixels, untrained, a run directory or weights",
    )  # fmt: skip
    parser.add_argument("--size", type=positive_int, help="side of the input in pixels (default: as in training)")
    parser.add_argument(
        "--resize", type=positive_int, help="shorter side before the centre crop (default: as in training)"
    )
    parser.add_argument(
        "--batch", type=positive_int, help="images per forward pass (default: 64, more if they are small)"
    )
    parser.add_argument("--no-cache", action="store_true", help="neither read nor write cached features")
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object as the last line")


def parse_network(text: str) -> str:
    """Return one of ``BASELINES``, or the path of a run or weights."""
    return text if text in BASELINES else str(local_path(text))


def run(arguments: argparse.Namespace) -> int:
    result, text = measure(arguments)
    print(text)
    if arguments.json:
        print(json.dumps(result))
    return 0


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the measured values, and the lines to print.

    Raises:
        StreamtrainError: options, images or weights that cannot be used.
    """
    if arguments.task in PAIR_TASKS:
        # torch takes seconds to load
        from streamtrain.cli import correspondence_quality, dense_quality

        found = correspondence_quality.evaluate(arguments)
        return found, dense_quality.format_result(found)
    if arguments.pairs is not None:
        raise StreamtrainError(f"--pairs belongs to {' and '.join(PAIR_TASKS)}; remove it for {arguments.task}")
    if arguments.train is None:
        raise StreamtrainError(f"evaluate {arguments.task} needs --train: labelled images to learn from")
    if arguments.task in DENSE_TASKS:
        from streamtrain.cli import dense_quality

        dense = dense_quality.evaluate(arguments)
        return dense, dense_quality.format_result(dense)
    from streamtrain.cli.feature_quality import evaluate

    for option, value in (("--labels", arguments.labels), ("--test-labels", arguments.test_labels)):
        if value is not None:
            raise StreamtrainError(f"{option} belongs to {' and '.join(DENSE_TASKS)}; remove it for {arguments.task}")
    if arguments.ignore:
        raise StreamtrainError(f"--ignore belongs to segmentation; remove it for {arguments.task}")
    result = evaluate(arguments)
    return result, format_result(result)


def format_result(result: dict[str, Any]) -> str:
    """Return the lines to print: accuracy, mean of the splits, the difference beyond chance, and the comparison."""
    if result["task"] == "knn":
        names = {key: f"k={key.removeprefix('knn_')} " for key in result if key.startswith("knn_")}
        title, chosen = "kNN", ""
    elif result["task"] == "logistic":
        names, title, chosen = {"logistic": ""}, "logistic regression", f" (C {result['penalty']:.3g})"
    else:
        names, title, chosen = {"linear": ""}, "linear probe", f" (learning rate {result['learning_rate']:g})"
    step = f" at step {result['step']}" if "step" in result and result["features"] != "untrained" else ""
    lines = [
        f"{title} accuracy {_percentages(result, names)}{chosen}: {result['features']}{step}, {result['size']} px, "
        f"{result['train_images']} train and {result['test_images']} test images, {result['classes']} classes (the "
        f"largest has {result['largest_class']:.0%})"
    ]
    num_splits = result.get("splits")
    if num_splits == 1:
        most = MAX_IMAGES_FOR_SPLITS[result["task"]]
        lines.append(f"one split was tested; with at most {most} images, {result['task']} tests all five")
    elif num_splits:
        spread = " and ".join(f"{100 * result[f'spread_{name}']:.1f}" for name in names)
        lines.append(
            f"over {num_splits} splits, which test every image once: {_percentages(result, names, 'mean_')}; "
            f"the standard deviation between splits is {spread} points"
        )
    least = max(result[f"real_difference_{name}"] for name in names)
    lines.append(
        f"± is a 95% interval; two networks differ by more than chance if they are {100 * least:.1f} points apart"
        f"{' over these splits' if (num_splits or 0) > 1 else ''} (--compare NETWORK often needs less)"
    )
    if "compared_with" in result:
        over = {name: (result[f"over_{name}"], result[f"margin_over_{name}"]) for name in names}
        texts = [
            f"{names[name]}{100 * difference:+.1f} points ± {100 * margin:.1f} "
            f"({'may be chance' if abs(difference) <= margin else 'better' if difference > 0 else 'worse'})"
            for name, (difference, margin) in over.items()
        ]
        lines.append(f"compared with {result['compared_with']} on the same images: {', '.join(texts)}")
    return "\n".join(lines)


def _percentages(result: dict[str, Any], names: dict[str, str], prefix: str = "") -> str:
    return ", ".join(
        f"{label}{result[prefix + name]:.1%} ± {100 * result[f'margin_{prefix}{name}']:.1f}"
        for name, label in names.items()
    )
