"""``streamtrain evaluate correspondence``: find points of one image in another by frozen patch features."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from shards.format.pixels import PixelFormat
from streamtrain.cli.dense_quality import (
    DenseMeasurement,
    Score,
    describe_differences,
    describe_scores,
    select_network,
)
from streamtrain.cli.feature_quality import Values, select_networks
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.correspondence import THRESHOLDS, count_correct
from streamtrain.evaluation.maps import map_size
from streamtrain.evaluation.pairs import ImagePair, read_pairs
from streamtrain.evaluation.patches import PatchNetwork

# options of the tasks that learn from labelled images
_FOREIGN = ("train", "test", "labels", "test_labels", "ignore", "resize", "batch")


def evaluate(arguments: argparse.Namespace) -> Values:
    """Measure the selected network; keys are described in docs/evaluation.md.

    Raises:
        StreamtrainError: options, pairs or images that cannot be used.
    """
    for name in _FOREIGN:
        if getattr(arguments, name) is not None:
            raise StreamtrainError(f"--{name.replace('_', '-')} does not belong to evaluate correspondence; remove it")
    if arguments.pairs is None:
        raise StreamtrainError("evaluate correspondence needs --pairs: a file of image pairs with points of each")
    pairs = read_pairs(arguments.pairs)
    arguments, other, pixels = select_networks(arguments)
    measured, network, described = _measure(arguments, pairs, pixels)
    result: Values = {
        "task": arguments.task,
        **described,
        "size": network.size,
        "patch_size": network.patch_size,
        "pairs": str(arguments.pairs),
        **measured.facts,
        **describe_scores(measured),
    }
    if other is not None:
        compared, _, _ = _measure(other, pairs, pixels, like=network)
        result |= {"compared_with": arguments.compare, **describe_differences(measured, compared)}
    return result


def _measure(
    arguments: argparse.Namespace, pairs: list[ImagePair], pixels: PixelFormat, like: PatchNetwork | None = None
) -> tuple[DenseMeasurement, PatchNetwork, Values]:
    """Return the scores of the network that the options select, with its input size, and its description."""
    network, background, described = select_network(arguments, pixels, like)
    if arguments.size is None and not (arguments.pixels and like is not None):
        # the training size of a small network has too few patches to find a point
        size = map_size(network.size, network.patch_size)
        network = replace(network, size=size, resize=size)
    counts = count_correct(network, pairs, pixels, background)
    sums: dict[str, tuple[np.ndarray, Score]] = {
        f"pck_{share:g}": (counts[:, [column, -1]], _share) for column, share in enumerate(THRESHOLDS)
    }
    facts: Values = {"test_pairs": len(pairs), "test_points": int(counts[:, -1].sum())}
    return DenseMeasurement(sums, tuple(range(len(pairs))), facts, {}), network, described


def _share(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[..., 0] / sums[..., 1])
