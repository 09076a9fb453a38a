"""Depth from frozen patch features: ridge regression of log depth, in closed form.

The head maps each patch to the log of its depth, upsampled bilinearly to pixels. It minimises the mean squared error of
the log over random pixels of every training image. Their normal equations are summed batch by batch, so memory does not
depend on the number of images. The penalty is chosen on a held-out tenth of the training images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shards.randomness import permutation
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.label_maps import MappedImages
from streamtrain.evaluation.patches import PatchNetwork, at_pixels, feature_batches, upsampled
from streamtrain.evaluation.segmentation import sample

MAX_PER_IMAGE = 1024
# of standardised features, relative to the number of pixels
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))
DELTA = 1.25
HELD_OUT_SHARE = 0.1
_HELD, _PIXELS = "evaluation/depth held out", "evaluation/depth pixels"


class Moments:
    """Sums over pixels of the products of D features, T targets and a constant 1, in fp64."""

    def __init__(self, dim: int, device: torch.device, targets: int = 1) -> None:
        self.dim, self.targets = dim, targets
        self.products = torch.zeros(dim + targets + 1, dim + targets + 1, dtype=torch.float64, device=device)

    def add(self, features: Tensor, target: Tensor) -> None:
        """Add features [P, D] and their targets [P, T], or [P] of one."""
        ones = features.new_ones(len(features), 1, dtype=torch.float64)
        rows = torch.cat([features.double(), target.double().view(len(features), -1), ones], 1)
        self.products += rows.T @ rows

    def joined(self, other: Moments) -> Moments:
        both = Moments(self.dim, self.products.device, self.targets)
        both.products = self.products + other.products
        return both

    @property
    def count(self) -> float:
        return float(self.products[-1, -1])

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Return mean [D + T] and covariance [D + T, D + T] of features and targets."""
        mean = self.products[:-1, -1] / self.count
        return mean, self.products[:-1, :-1] / self.count - mean[:, None] * mean


@dataclass(frozen=True)
class DepthHead:
    """A linear head for log depth, weight [D, 1], and the range of log depth in training, which bounds predictions."""

    weight: Tensor
    bias: Tensor
    penalty: float
    range: tuple[float, float]

    def depth(self, features: Tensor, network: PatchNetwork) -> Tensor:
        """Return the depth [size, size] from patch features [patches, D]."""
        logs = features @ self.weight.to(features) + self.bias.to(features)
        return upsampled(logs, network.side, network.size)[..., 0].clamp(*self.range).exp()


@dataclass(frozen=True)
class DepthErrors:
    """Sums over the pixels of each test image [N, 3]: squared error, pixels within ``DELTA``, pixels.

    ``images`` [N]: indices of the test images with known depth.
    """

    sums: np.ndarray
    images: tuple[int, ...]
    penalty: float
    train_images: int
    train_pixels: int
    feature_dim: int


def estimate_depth(network: PatchNetwork, train: MappedImages, test: MappedImages) -> DepthErrors:
    """Train and test on the centre crops of images.

    Raises:
        StreamtrainError: a map cannot be used, or too few images have known depth.
    """
    head, num_images, num_pixels = train_head(network, train)
    images: list[int] = []
    sums: list[np.ndarray] = []
    for indices, features, maps in feature_batches(network, test):
        for index, one, expected in zip(indices, features, maps, strict=True):
            if (is_known := expected > 0).any():
                images.append(index)
                sums.append(sum_errors(head.depth(one, network).cpu().numpy()[is_known], expected[is_known]))
    if len(images) < 2:
        raise StreamtrainError(f"{len(images)} images of {test.images.name} have known depth, two are needed")
    return DepthErrors(np.stack(sums), tuple(images), head.penalty, num_images, num_pixels, len(head.weight))


def train_head(network: PatchNetwork, train: MappedImages) -> tuple[DepthHead, int, int]:
    """Return the head, and the numbers of images and pixels that trained it. Raises as ``estimate_depth``."""
    held = set(permutation(0, _HELD, len(train))[: max(int(len(train) * HELD_OUT_SHARE), 1)].tolist())
    sums: dict[bool, Moments] = {}
    low, high, num_images = math.inf, -math.inf, 0
    for indices, features, maps in feature_batches(network, train):
        sums = sums or {kind: Moments(features.shape[2], features.device) for kind in (False, True)}
        for index, one, depth in zip(indices, features, maps, strict=True):
            pixels = sample(depth.ravel() > 0, MAX_PER_IMAGE, _PIXELS, index)
            if len(pixels):
                logs = torch.from_numpy(np.log(depth.ravel()[pixels].astype(np.float64))).to(one.device)
                at = torch.from_numpy(pixels).to(one.device)
                sums[index in held].add(at_pixels(one, network.side, network.size, at), logs)
                low, high, num_images = min(low, float(logs.min())), max(high, float(logs.max())), num_images + 1
    if not sums or not sums[False].count or not sums[True].count:
        raise StreamtrainError(f"{num_images} images of {train.images.name} have known depth, too few to learn from")
    heads = fit_ridge(sums[False], PENALTIES)
    best = min(range(len(PENALTIES)), key=lambda index: squared_error(sums[True], *heads[index]))
    whole = sums[False].joined(sums[True])
    ((weight, bias),) = fit_ridge(whole, PENALTIES[best : best + 1])
    return DepthHead(weight, bias, PENALTIES[best], (low, high)), num_images, int(whole.count)


def fit_ridge(moments: Moments, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Return weight [D, T] and bias [T] in fp64 for each penalty: of standardised features, per pixel."""
    (mean, covariance), dim = moments.covariance(), moments.dim
    deviation = covariance.diagonal()[:dim].clamp_min(1e-12).sqrt()[:, None]
    values, vectors = torch.linalg.eigh(covariance[:dim, :dim] / (deviation * deviation.T))
    projected = vectors.T @ (covariance[:dim, dim:] / deviation)
    weights = [vectors @ (projected / (values.clamp_min(0) + penalty)[:, None]) / deviation for penalty in penalties]
    return [(weight, mean[dim:] - mean[:dim] @ weight) for weight in weights]


def squared_error(moments: Moments, weight: Tensor, bias: Tensor) -> float:
    """Return the mean squared error of a head over the pixels of ``moments``, summed over the targets."""
    residual = torch.cat([weight, -torch.eye(moments.targets).to(weight), bias[None]])
    return float((residual * (moments.products @ residual)).sum()) / moments.count


def sum_errors(depth: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return float64 [3] of pixels [P] as in ``DepthErrors``."""
    depth, expected = depth.astype(np.float64), expected.astype(np.float64)
    ratio = np.maximum(depth / expected, expected / depth)
    return np.array([((depth - expected) ** 2).sum(), (ratio < DELTA).sum(), len(expected)])


def rmse(sums: np.ndarray) -> np.ndarray:
    """Return the root of the mean squared error over all pixels [...] of sums [..., 3]."""
    return np.sqrt(sums[..., 0] / sums[..., 2])


def delta1(sums: np.ndarray) -> np.ndarray:
    """Return the share of pixels [...] whose predicted and true depth differ by a factor below ``DELTA``."""
    return sums[..., 1] / sums[..., 2]
