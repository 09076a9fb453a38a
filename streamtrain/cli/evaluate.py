"""``streamtrain evaluate``: measure how well frozen features separate the classes of labelled images."""

from __future__ import annotations

import argparse
import json
from typing import Any

from streamtrain.cli.arguments import add_command, positive_int
from streamtrain.cli.backbone import add_backbone_arguments, add_device_argument
from streamtrain.run.command_line import local_path

TASKS = ("knn", "linear", "logistic")

_SUMMARY = "Measure the accuracy of kNN, a linear probe or logistic regression on frozen features."
_DETAILS = """\
SET is a shard set, or a folder with one subfolder per class. Without --test, a fixed fifth of --train is
held out for testing; the split is the same for every network and every run.
"""
_EXAMPLES = """\
  streamtrain evaluate knn --run runs/photos --train sets/train --test sets/test --json
  streamtrain evaluate linear --weights exported --train sets/train --test sets/test
  streamtrain evaluate logistic --run runs/photos --step best --train sets/train
  streamtrain evaluate knn --pixels --train sets/train
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "evaluate", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("task", choices=TASKS)
    add_backbone_arguments(parser)
    parser.add_argument("--pixels", action="store_true", help="use the pixels themselves as features, no network")
    parser.add_argument("--train", type=local_path, required=True, metavar="SET", help="labelled images to learn from")
    parser.add_argument("--test", type=local_path, metavar="SET", help="labelled images to predict")
    parser.add_argument("--size", type=positive_int, help="side of the input in pixels (default: as in training)")
    parser.add_argument("--resize", type=positive_int, help="shorter side before the centre crop (default: --size)")
    parser.add_argument("--batch", type=positive_int, default=64, help="images per forward (default: 64)")
    add_device_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one flat JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    # torch takes seconds to load
    from streamtrain.cli.feature_quality import evaluate

    result = evaluate(arguments)
    print(format_result(result))
    if arguments.json:
        print(json.dumps(result))
    return 0


def format_result(result: dict[str, str | int | float]) -> str:
    if result["task"] == "knn":
        counts = [key.removeprefix("knn_") for key in result if key.startswith("knn_")]
        scores = ", ".join(f"k={count} {result[f'knn_{count}']:.2%}" for count in counts)
        scores = f"kNN accuracy {scores}"
    elif result["task"] == "logistic":
        scores = f"logistic regression accuracy {result['logistic']:.2%} (C {result['penalty']:.3g})"
    else:
        scores = f"linear probe accuracy {result['linear']:.2%} (learning rate {result['learning_rate']:g})"
    step = f" at step {result['step']}" if "step" in result and result["features"] != "untrained" else ""
    return (
        f"{scores}: {result['features']}{step}, {result['size']} px, {result['train_images']} train and "
        f"{result['test_images']} test images, {result['classes']} classes"
    )
