"""Semantic segmentation from frozen patch features: a linear probe and nearest neighbours.

The linear probe is that of ``linear.py`` on features that are upsampled bilinearly to pixels. A linear layer commutes
with the upsampling, so this is the usual probe, logits per patch upsampled to pixels, with its per-pixel cross-entropy.
It is trained on random labelled pixels of every training image. Nearest neighbours are searched for each patch, among
random patches of the training images with the label of most of their pixels; all pixels of a patch get its label.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.randomness import permutation, uniforms
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.held_out import stratified_indices
from streamtrain.evaluation.knn import knn_predict
from streamtrain.evaluation.label_maps import Array, MappedImages
from streamtrain.evaluation.linear import EPOCHS, LinearProbe, train_probe
from streamtrain.evaluation.patches import PatchNetwork, at_pixels, feature_batches, upsampled
from streamtrain.run.progress import progress_bar

NEIGHBOURS = 20
# pixels that train the probe, and patches that are searched; both also bounded by their bytes
MAX_PIXELS, MAX_PATCHES, MAX_BYTES = 200_000, 100_000, 1 << 29
MAX_PER_IMAGE = 256
# rows of all epochs
_EPOCH_ROWS = 2_000_000
_LOGITS_BYTES = 1 << 26
_HELD, _PIXELS, _PATCHES = "evaluation/dense held out", "evaluation/dense pixels", "evaluation/dense patches"


@dataclass(frozen=True)
class TrainingPatches:
    """Labelled features of training images.

    Attributes:
        pixels: fp32 [N, D], at single pixels, with classes int64 [N] and numbers of their images int64 [N].
        patches: fp32 [M, D], with classes int64 [M].
    """

    pixels: Tensor
    pixel_classes: Tensor
    pixel_images: Tensor
    patches: Tensor
    patch_classes: Tensor


@dataclass(frozen=True)
class Segmented:
    """Numbers of pixels of each class in test images [N, 3, classes], by method: labelled, predicted, both.

    Unlabelled pixels do not count. ``images`` [N]: indices of the test images with labelled pixels.
    """

    counts: dict[str, np.ndarray]
    images: tuple[int, ...]
    learning_rate: float
    train_images: int
    train_pixels: int
    train_patches: int
    feature_dim: int


def segment(network: PatchNetwork, train: MappedImages, test: MappedImages) -> Segmented:
    """Train and test on the centre crops of images.

    Raises:
        StreamtrainError: a map cannot be used, or all labelled pixels have the same class.
    """
    if len(train) > MAX_PATCHES:
        train = train.subset(stratified_indices(len(train), MAX_PATCHES), train.images.name)
    rows = training_patches(network, train)
    if len(torch.unique(rows.pixel_classes)) < 2:
        raise StreamtrainError(f"all labelled pixels of {train.images.name} have the same class; give several classes")
    epochs = min(max(_EPOCH_ROWS // len(rows.pixels), 1), EPOCHS)
    with progress_bar("linear probe", epochs, "epochs") as bar:
        probe = train_probe(
            rows.pixels, rows.pixel_classes, int(rows.pixel_classes.max()) + 1, epochs,
            lambda done: bar.update(done - bar.n), held_first(rows.pixel_images),
        )  # fmt: skip
    images: list[int] = []
    counts: dict[str, list[np.ndarray]] = {"linear": [], "knn": []}
    for indices, features, maps in feature_batches(network, test):
        patches = knn_classes(rows, features)
        for index, one, found, expected in zip(indices, features, patches, maps, strict=True):
            if (is_labelled := expected >= 0).any():
                images.append(index)
                guesses = {"linear": linear_classes(probe, one, network), "knn": _enlarged(found, network)}
                for name, guess in guesses.items():
                    counts[name].append(count_pixels(expected[is_labelled], guess.cpu().numpy()[is_labelled]))
    if len(images) < 2:
        raise StreamtrainError(f"{len(images)} images of {test.images.name} have labelled pixels, two are needed")
    classes = max(each.shape[1] for method in counts.values() for each in method)
    return Segmented(
        {name: _stacked(each, classes) for name, each in counts.items()}, tuple(images), probe.learning_rate,
        len(torch.unique(rows.pixel_images)), len(rows.pixels), len(rows.patches), rows.pixels.shape[1],
    )  # fmt: skip


def training_patches(network: PatchNetwork, train: MappedImages) -> TrainingPatches:
    """Return labelled features of random pixels and patches; the same number of every image, or all that it has."""
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for indices, features, maps in feature_batches(network, train):
        dim = features.shape[2]
        num_pixels, num_patches = (
            min(max(min(most, MAX_BYTES // (4 * dim)) // len(train), 1), MAX_PER_IMAGE)
            for most in (MAX_PIXELS, MAX_PATCHES)
        )
        for index, one, labels in zip(indices, features, maps, strict=True):
            pixels = sample(labels.ravel() >= 0, num_pixels, _PIXELS, index)
            majority = majority_classes(labels, network.side)
            patches = sample(majority >= 0, num_patches, _PATCHES, index)
            parts.append((
                at_pixels(one, network.side, network.size, torch.from_numpy(pixels).to(one.device)),
                torch.from_numpy(labels.ravel()[pixels].astype(np.int64)),
                torch.full((len(pixels),), index),
                one[torch.from_numpy(patches).to(one.device)],
                torch.from_numpy(majority[patches]),
            ))  # fmt: skip
    if not sum(len(part[0]) for part in parts):
        raise StreamtrainError(f"no image of {train.images.name} has a labelled pixel")
    device = parts[0][0].device
    return TrainingPatches(*(torch.cat(each).to(device) for each in zip(*parts, strict=True)))


def sample(is_chosen: np.ndarray, count: int, purpose: str, index: int) -> np.ndarray:
    """Return all true positions of bool [P], or ``count`` random ones, int64; they depend only on image ``index``."""
    positions = np.flatnonzero(is_chosen)
    if len(positions) <= count:
        return positions
    return positions[(uniforms(0, purpose, np.array([index]), count)[0] * len(positions)).astype(np.int64)]


def held_first(images: Tensor) -> Tensor:
    """Return an order of rows, given the image int64 [N] of each, in which images are shuffled as a whole."""
    _, numbers = torch.unique(images, return_inverse=True)
    shuffled = torch.from_numpy(permutation(0, _HELD, int(numbers.max()) + 1)).to(images.device)
    return torch.argsort(shuffled[numbers], stable=True)


def majority_classes(labels: Array, side: int) -> np.ndarray:
    """Return the commonest class of the labelled pixels of each patch, int64 [side * side]; -1 without any."""
    patch = len(labels) // side
    by_patch = labels.reshape(side, patch, side, patch).swapaxes(1, 2).reshape(side * side, -1).astype(np.int64)
    classes = int(by_patch.max()) + 1
    if classes == 0:
        return np.full(side * side, -1)
    patches, pixels = np.nonzero(by_patch >= 0)
    counts = np.bincount(patches * classes + by_patch[patches, pixels], minlength=side * side * classes)
    counts = counts.reshape(-1, classes)
    return np.where(counts.any(1), counts.argmax(1), -1)


def knn_classes(rows: TrainingPatches, features: Tensor) -> Tensor:
    """Return the predicted class of each patch int64 [B, patches]."""
    guesses = knn_predict(rows.patches, rows.patch_classes, features.flatten(0, 1), (NEIGHBOURS,))
    return guesses[NEIGHBOURS].unflatten(0, tuple(features.shape[:2]))


def linear_classes(probe: LinearProbe, features: Tensor, network: PatchNetwork) -> Tensor:
    """Return the predicted class of each pixel int64 [size, size]: logits of patches [patches, D], upsampled."""
    logits, size = probe.logits(features), network.size
    rows = max(_LOGITS_BYTES // (4 * size * logits.shape[1]), 1)
    return torch.cat([
        upsampled(logits, network.side, size, range(start, min(start + rows, size))).argmax(-1)
        for start in range(0, size, rows)
    ])  # fmt: skip


def _enlarged(patches: Tensor, network: PatchNetwork) -> Tensor:
    """Return the class of each pixel's patch [size, size]."""
    grid = patches.unflatten(0, (network.side, network.side))
    return grid.repeat_interleave(network.patch_size, 0).repeat_interleave(network.patch_size, 1)


def count_pixels(expected: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """Return the numbers of pixels of each class [3, classes]: labelled, predicted, both; up to the largest class."""
    classes = int(max(expected.max(), guess.max())) + 1
    kinds = expected, guess, expected[expected == guess]
    return np.stack([np.bincount(kind, minlength=classes) for kind in kinds])


def _stacked(counts: list[np.ndarray], classes: int) -> np.ndarray:
    """Return counts of images [3, any] as [N, 3, classes]."""
    return np.stack([np.pad(each, ((0, 0), (0, classes - each.shape[1]))) for each in counts])


def class_iou(sums: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class [..., classes]; NaN if no pixel is labelled with it.

    Args:
        sums: [..., 3, classes], as ``count_pixels``.
    """
    labelled, predicted, both = np.moveaxis(sums.astype(np.float64), -2, 0)
    with np.errstate(invalid="ignore"):
        return np.where(labelled > 0, both / (labelled + predicted - both), np.nan)


def mean_iou(sums: np.ndarray) -> np.ndarray:
    """Return the mean over the labelled classes of the intersection over union [...]."""
    return np.nanmean(class_iou(sums), -1)


def pixel_accuracy(sums: np.ndarray) -> np.ndarray:
    """Return the share of labelled pixels that are predicted correctly [...]."""
    return sums[..., 2, :].sum(-1) / sums[..., 0, :].sum(-1)
