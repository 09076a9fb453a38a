#!/usr/bin/env python3
"""How good are the features? kNN, a linear probe or logistic regression on labelled images, with frozen weights.

python tools/evaluate.py knn --run RUN --train SET [--test SET] [--json]
python tools/evaluate.py linear --weights W --train SET --test SET
python tools/evaluate.py logistic --run RUN --step best --train SET
python tools/evaluate.py knn --pixels --train SET

SET is a shard set or a folder of class subfolders. Without --test, a fixed fifth of --train, the same for every
network and every run, is held out for testing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbone_arguments import add_backbone_arguments

from shards.errors import ShardError
from streamtrain.errors import StreamtrainError


def main() -> int:
    arguments = parse_arguments()
    try:
        from feature_quality import evaluate  # torch takes seconds to load

        result = evaluate(arguments)
    except (StreamtrainError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(readable(result))
    if arguments.json:
        print(json.dumps(result))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("knn", "linear", "logistic"))
    add_backbone_arguments(parser)
    parser.add_argument("--pixels", action="store_true", help="no network: the pixels themselves as features")
    parser.add_argument("--train", type=Path, required=True, metavar="SET", help="labelled images to learn from")
    parser.add_argument("--test", type=Path, metavar="SET", help="labelled images to predict")
    parser.add_argument("--size", type=int, help="side of the input in pixels (default: as in training)")
    parser.add_argument("--resize", type=int, help="shorter side before the centre crop (default: --size)")
    parser.add_argument("--batch", type=int, default=64, help="images at a time (default 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one flat JSON object last")
    return parser.parse_args()


def readable(result: dict[str, str | int | float]) -> str:
    """One line: what was measured on what."""
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


if __name__ == "__main__":
    sys.exit(main())
