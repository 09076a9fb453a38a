"""Uncertainty of scores: 95 % intervals, and differences of two networks on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from shards.randomness import generator

# of the normal distribution: 95 % lie within this many standard deviations
Z = 1.959964
RESAMPLES = 1000
# at a time, which bounds the memory
_CHUNK = 100
_BOOTSTRAP = "evaluation/bootstrap"


def accuracy_margin(accuracy: float, count: int) -> float:
    """Return the ± of an accuracy measured on ``count`` images: a 95 % interval for other images of the same kind.

    It is the distance to the farther end of Wilson's interval, which is sound for few images and near 0 and 1.
    """
    centre = (accuracy + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(accuracy * (1 - accuracy) / count + Z**2 / (4 * count**2))
    return abs(centre - accuracy) + half


def difference_margin(accuracy: float, other: float, count: int) -> float:
    """Return the smallest difference of two accuracies, each measured on ``count`` images, that is not chance (95 %).

    It assumes that the two classifiers fail independently. On the same images they mostly fail together, and a smaller
    difference counts: see ``paired_difference``.
    """
    return math.hypot(accuracy_margin(accuracy, count), accuracy_margin(other, count))


def paired_difference(is_right: np.ndarray, is_other_right: np.ndarray) -> tuple[float, float]:
    """Return the difference of two accuracies on the same images, and its ± (95 %).

    Only images on which the classifiers disagree count. Each of the four counts of right and wrong is raised by a half
    (Agresti and Min 2005), so that the ± is never 0.

    Args:
        is_right, is_other_right: bool [N], image by image.
    """
    gained = int((is_right & ~is_other_right).sum())
    lost = int((is_other_right & ~is_right).sum())
    count, disagree = len(is_right) + 2, gained + lost + 1
    variance = (disagree - (gained - lost) ** 2 / count) / count**2
    return (gained - lost) / len(is_right), Z * math.sqrt(variance)


def bootstrap(sums: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return a score of ``RESAMPLES`` random draws of N images with replacement, float64 [RESAMPLES].

    The draws depend only on N, so that the scores of two networks on the same images can be subtracted.

    Args:
        sums: [N, ...], of each image.
        score: maps sums over images [R, ...] to [R].
    """
    draws, flat, scores = generator(0, _BOOTSTRAP), sums.reshape(len(sums), -1).astype(np.float64), []
    for _ in range(RESAMPLES // _CHUNK):
        # random() is the same in every version of numpy
        drawn = (draws.random((_CHUNK, len(sums))) * len(sums)).astype(np.int64)
        counts = np.stack([np.bincount(row, minlength=len(sums)) for row in drawn])
        scores.append(score((counts @ flat).reshape(_CHUNK, *sums.shape[1:])))
    return np.concatenate(scores)


def bootstrap_margin(scores: np.ndarray) -> float:
    """Return the ± (95 %) from the scores, or differences of scores, of ``bootstrap``."""
    return Z * float(np.std(scores, ddof=1))
