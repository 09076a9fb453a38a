#!/usr/bin/env python3
"""Print the quick start's kNN accuracies of pixels, untrained and trained network, and what their differences mean.

python tools/compare_accuracies.py PIXELS UNTRAINED TRAINED

Each argument is the output of ``streamtrain evaluate knn --json``: a log whose last line is a JSON object.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# 95 % of a normal distribution lie within this many standard deviations
WIDTH = 1.96
NAME = "knn_10"


@dataclass(frozen=True)
class Accuracy:
    """A share of correctly classified test images, with its 95 % interval.

    Attributes:
        value, margin: the accuracy and its ±, as shares.
        count: tested images.
    """

    value: float
    margin: float
    count: int


def read_accuracy(result: dict[str, Any]) -> Accuracy:
    """Return the mean accuracy of several splits, or the accuracy of a single split."""
    name, count = NAME, int(result["test_images"])
    if f"mean_{NAME}" in result:
        name, count = f"mean_{NAME}", count + int(result["train_images"])
    value = float(result[name])
    # of a binomial distribution, where the evaluation states none
    margin = result.get(f"margin_{name}", WIDTH * math.sqrt(value * (1 - value) / count))
    return Accuracy(value, float(margin), count)


def describe(pixels: Accuracy, untrained: Accuracy, trained: Accuracy) -> str:
    """Return the table of the accuracies, what counts as a difference, and whether the training helped."""
    rows = zip(("pixels", "untrained", "trained"), (pixels, untrained, trained), strict=True)
    lines = [f"   {name:16} {100 * one.value:6.1f} % ± {100 * one.margin:.1f}" for name, one in rows]
    baselines = {"pixels": pixels, "untrained": untrained}
    margins = {name: math.hypot(trained.margin, one.margin) for name, one in baselines.items()}
    lines.append(
        f"± is a 95 % interval on {trained.count} test images. "
        f"A difference counts from {100 * max(margins.values()):.1f} points on:"
    )
    for name, one in baselines.items():
        lines.append(f"   {compare(name, trained.value - one.value, margins[name], trained.count)}")
    return "\n".join(lines)


def compare(name: str, difference: float, margin: float, count: int) -> str:
    if abs(difference) <= margin:
        return f"trained and {name}: no difference can be seen on {count} test images"
    better, worse = ("trained", name) if difference > 0 else (name, "trained")
    return f"{better} beats {worse} by {100 * abs(difference):.1f} ± {100 * margin:.1f} points"


def main() -> None:
    results = [json.loads(Path(path).read_text().splitlines()[-1]) for path in sys.argv[1:]]
    print(describe(*map(read_accuracy, results)))


if __name__ == "__main__":
    main()
