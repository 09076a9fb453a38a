"""Segmentation and depth from the teacher's patch features while training, on the evaluation images that have maps.

A small version of ``segmentation.py`` and ``depth.py``, of bounded cost: at most ``TRAIN_IMAGES`` and ``TEST_IMAGES``
images, which are embedded once for both tasks, and a few pixels of each. Linear layers are fitted in closed form. All
images, pixels and patches are chosen by their numbers alone and put into the order of the images, so the results depend
neither on the step nor on the number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from shards.errors import ShardError, printable
from shards.format.label_maps import CLASS_IDS, DEPTH, MAP_KINDS, MAX_CLASSES, Array
from streamtrain.config.evaluation import DENSE
from streamtrain.data.still_images import centre_crop, still_size
from streamtrain.evaluation.depth import Moments, delta1, fit_ridge, rmse, sum_errors
from streamtrain.evaluation.features import GREY, batch_spans, ordered_batches
from streamtrain.evaluation.held_out import stratified_indices
from streamtrain.evaluation.images import LabelledImages
from streamtrain.evaluation.knn import knn_predict
from streamtrain.evaluation.label_maps import crop_map
from streamtrain.evaluation.patches import at_pixels
from streamtrain.evaluation.segmentation import NEIGHBOURS, count_pixels, majority_classes, mean_iou, sample
from streamtrain.ops.collectives import gather_rows, sum_over_ranks

if TYPE_CHECKING:
    from streamtrain.evaluation.online import Study

TRAIN_IMAGES, TEST_IMAGES = 192, 96
# of a training image: pixels for the linear layers, patches that are searched; and pixels of a test image
PIXELS, PATCHES, TEST_PIXELS = 128, 32, 256
# of the features of training pixels, and of training patches
_MAX_BYTES = 1 << 28
# of standardised features, relative to the number of pixels
PENALTY = 1e-3
# images per forward and rank, whatever the number of ranks, so that features are the same to the last bit
_BATCH = 32
_PIXELS, _PATCHES, _TESTED = "evaluation/online pixels", "evaluation/online patches", "evaluation/online tested"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Grid:
    """The crop of an image, ``size`` x ``size`` pixels in ``side`` x ``side`` patches."""

    size: int
    side: int

    def at_pixels(self, values: Tensor, pixels: np.ndarray) -> Tensor:
        """Return patch values [patches, C] upsampled at flat pixels [P]: [P, C]."""
        return at_pixels(values, self.side, self.size, torch.from_numpy(pixels).to(values.device))

    def patches_of(self, pixels: np.ndarray) -> Tensor:
        """Return the patch of each flat pixel [P], int64 [P]."""
        patch = self.size // self.side
        return torch.from_numpy(pixels // self.size // patch * self.side + pixels % self.size // patch)


@dataclass
class _TrainingRows:
    """At most ``count`` rows of each of this rank's training images, padded so that all have equally many."""

    count: int
    features: list[Tensor] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)

    def choose(self, values: np.ndarray, is_known: np.ndarray, purpose: str, number: int) -> np.ndarray:
        """Choose positions [count] of known values [N], and keep these values, NaN where there are too few."""
        chosen = sample(is_known, self.count, purpose, number)
        positions, targets = np.zeros(self.count, np.int64), np.full(self.count, np.nan)
        positions[: len(chosen)], targets[: len(chosen)] = chosen, values[chosen]
        self.targets.append(targets)
        return positions

    def gather(self) -> tuple[Tensor, Tensor]:
        """Return features fp32 [N, D] and targets fp64 [N] of all ranks, in the order of the images. Collective."""
        features = gather_rows(torch.stack(self.features))
        targets = gather_rows(torch.from_numpy(np.stack(self.targets)).to(features.device))
        # rank r has the images r, r + world size, …
        order = torch.arange(len(features), device=features.device).view(-1, len(self.features)).T.flatten()
        features, targets = features[order].flatten(0, 1), targets[order].flatten()
        # features of a diverged network are not finite
        is_known = ~targets.isnan() & features.isfinite().all(1)
        return features[is_known], targets[is_known]


class _Task(Protocol):
    """A probe that is fed with patch features [patches, D] and the map [size, size] of one image after the other."""

    def add_training(self, number: int, features: Tensor, values: Array | None) -> None:
        """Take training image ``number``; None: it has no map."""

    def fit(self) -> bool:
        """Train on the images of all ranks; return whether that was possible. Collective."""

    def add_test(self, number: int, features: Tensor, values: Array) -> None: ...

    def result(self) -> dict[str, float]:
        """Return the metrics over the test images of all ranks; empty without any. Collective."""


class _Segmentation:
    """kNN of patches, and a linear layer for the classes of pixels."""

    def __init__(self, grid: _Grid, per_image: int, device: torch.device) -> None:
        self._grid, self._device = grid, device
        self._pixels = _TrainingRows(min(PIXELS, per_image))
        self._patches = _TrainingRows(min(PATCHES, per_image, grid.side**2))
        # of kNN and of the linear layer: labelled, predicted, both
        self._counts = torch.zeros(2, 3, MAX_CLASSES, dtype=torch.float64)

    def add_training(self, number: int, features: Tensor, values: Array | None) -> None:
        labels = np.full((self._grid.size, self._grid.size), -1, np.int16) if values is None else values
        pixels = self._pixels.choose(labels.ravel(), labels.ravel() >= 0, _PIXELS, number)
        self._pixels.features.append(self._grid.at_pixels(features, pixels))
        majority = majority_classes(labels, self._grid.side)
        patches = self._patches.choose(majority, majority >= 0, _PATCHES, number)
        self._patches.features.append(features[torch.from_numpy(patches).to(features.device)])

    def fit(self) -> bool:
        (rows, classes), (self._bank, bank_classes) = self._pixels.gather(), self._patches.gather()
        self._bank_classes, self._known = bank_classes.long(), torch.unique(classes)
        if len(self._known) < 2 or not len(self._bank):
            return False
        moments = Moments(rows.shape[1], rows.device, len(self._known))
        moments.add(rows, (classes[:, None] == self._known).double())
        ((self._weight, self._bias),) = fit_ridge(moments, (PENALTY,))
        return True

    def add_test(self, number: int, features: Tensor, values: Array) -> None:
        labels = values.ravel().astype(np.int64)
        pixels = sample(labels >= 0, TEST_PIXELS, _TESTED, number)
        if not len(pixels):
            return
        by_patch = knn_predict(self._bank, self._bank_classes, features, (NEIGHBOURS,))[NEIGHBOURS].cpu()
        logits = self._grid.at_pixels(features.double() @ self._weight + self._bias, pixels)
        linear = self._known[logits.argmax(1)].long().cpu()
        for row, guess in enumerate((by_patch[self._grid.patches_of(pixels)], linear)):
            counts = count_pixels(labels[pixels], guess.numpy())
            self._counts[row, :, : counts.shape[1]] += torch.from_numpy(counts)

    def result(self) -> dict[str, float]:
        knn, linear = sum_over_ranks(self._counts.to(self._device)).cpu().numpy()
        if not knn[0].any():
            return {}
        return {"segmentation_knn_miou": float(mean_iou(knn)), "segmentation_linear_miou": float(mean_iou(linear))}


class _Depth:
    """A linear layer for the log of the depth."""

    def __init__(self, grid: _Grid, per_image: int, device: torch.device) -> None:
        self._grid, self._device = grid, device
        self._pixels = _TrainingRows(min(PIXELS, per_image))
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add_training(self, number: int, features: Tensor, values: Array | None) -> None:
        depth = np.zeros(self._grid.size**2) if values is None else values.ravel().astype(np.float64)
        is_known = depth > 0
        logs = np.log(depth, out=np.zeros_like(depth), where=is_known)
        pixels = self._pixels.choose(logs, is_known, _PIXELS, number)
        self._pixels.features.append(self._grid.at_pixels(features, pixels))

    def fit(self) -> bool:
        rows, self._logs = self._pixels.gather()
        if not len(rows):
            return False
        moments = Moments(rows.shape[1], rows.device)
        moments.add(rows, self._logs)
        ((self._weight, self._bias),) = fit_ridge(moments, (PENALTY,))
        return True

    def add_test(self, number: int, features: Tensor, values: Array) -> None:
        depth = values.ravel()
        pixels = sample(depth > 0, TEST_PIXELS, _TESTED, number)
        if len(pixels):
            logs = self._grid.at_pixels(features.double() @ self._weight + self._bias, pixels)[:, 0]
            guess = logs.clamp(self._logs.min(), self._logs.max()).exp()
            self._sums += torch.from_numpy(sum_errors(guess.cpu().numpy(), depth[pixels]))

    def result(self) -> dict[str, float]:
        sums = sum_over_ranks(self._sums.to(self._device)).cpu().numpy()
        return {"depth_rmse": float(rmse(sums)), "depth_delta1": float(delta1(sums))} if sums[2] else {}


_TASKS: dict[str, type[_Segmentation] | type[_Depth]] = {CLASS_IDS.name: _Segmentation, DEPTH.name: _Depth}
Maps = Mapping[str, Array]


def measure(study: Study) -> dict[str, float]:
    """Return the metrics of the evaluators ``DENSE`` that are configured, of the images with maps. Collective."""
    kinds = {name: kind for name, kind in DENSE.items() if name in study.config.evaluation.evaluators}
    train = study.failure.run(_choose, study.images.train, list(kinds.values()), TRAIN_IMAGES)
    test = study.failure.run(_choose, study.images.test, list(kinds.values()), TEST_IMAGES)
    results = _train_and_test(study, train, test, list(kinds.values())) if len(train) and len(test) else {}
    for name, kind in kinds.items():
        counts = train.count(kind), test.count(kind)
        if any(counts) and not any(metric.startswith(name) for metric in results):
            logger.warning(
                "no %s of %s: %d train and %d test images have a %s; both need some, of two classes or known depth",
                name, study.images.train.name, *counts, MAP_KINDS[kind].title,
            )  # fmt: skip
    return results


def _train_and_test(study: Study, train: _Chosen, test: _Chosen, kinds: list[str]) -> dict[str, float]:
    size = study.config.square_side
    grid = _Grid(size, size // study.config.model.patch_size)
    per_image = max(_MAX_BYTES // (4 * study.config.model.dim * len(train)), 1)
    tasks: dict[str, _Task] = {kind: _TASKS[kind](grid, per_image, study.runtime.device) for kind in kinds}
    for number, features, maps in _features(study, train):
        for kind, task in tasks.items():
            task.add_training(number, features, maps.get(kind))
    fitted = {kind: task for kind, task in tasks.items() if task.fit()}
    for number, features, maps in _features(study, test):
        for kind in fitted.keys() & maps.keys():
            fitted[kind].add_test(number, features, maps[kind])
    results: dict[str, float] = {}
    for task in fitted.values():
        results |= task.result()
    return results


@dataclass(frozen=True)
class _Chosen:
    """Images that have a map of any kind, and for each kind which of them have one, bool [N]."""

    images: LabelledImages
    has_map: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.images)

    def count(self, kind: str) -> int:
        return int(self.has_map[kind].sum()) if kind in self.has_map else 0


def _choose(images: LabelledImages, kinds: list[str], count: int) -> _Chosen:
    """Choose at most ``count`` images, evenly spread."""
    exist = {kind: images.maps.exist(kind) for kind in kinds} if images.maps is not None else {}
    found = np.flatnonzero(np.any(list(exist.values()), axis=0)) if exist else np.zeros(0, np.int64)
    chosen = found[stratified_indices(len(found), count)]
    return _Chosen(images.subset(chosen, images.name), {kind: rows[chosen] for kind, rows in exist.items()})


def _features(study: Study, chosen: _Chosen) -> Iterator[tuple[int, Tensor, Maps]]:
    """Yield number, patch features [patches, D] and maps [size, size] of this rank's images, equally many on each rank.

    Images beyond the last, which fill the last batch, have no maps. Collective.
    """
    runtime, size = study.runtime, study.config.square_side
    batch = min(_BATCH, study.config.crops.global_count * study.config.data.micro_batch)
    per_rank = -(-len(chosen) // (runtime.world_size * batch)) * batch
    numbers = runtime.rank + runtime.world_size * np.arange(per_rank)
    spans = list(batch_spans(per_rank, batch))
    batches = ordered_batches(lambda row: _crops(chosen, int(numbers[row]), size), spans, runtime.launch.cores)

    def load() -> tuple[Tensor, list[Maps]]:
        crops, maps = zip(*next(batches), strict=True)
        return torch.from_numpy(np.stack(crops)).to(runtime.device), list(maps)

    for span in study.wrap(spans):
        crops, maps = study.failure.run(load)
        features = study.embed(crops).patches.float()
        yield from zip(numbers[span.start : span.stop].tolist(), features, maps, strict=True)


def _crops(chosen: _Chosen, number: int, size: int) -> tuple[np.ndarray, Maps]:
    """Return the centre crop of an image, grey if there is none or it is unusable, and of its usable maps."""
    images = chosen.images
    image = images.decode_if_usable(number) if number < len(images) else None
    if image is None:
        dtype = np.uint8 if images.pixels.dtype == "uint8" else np.float32
        return np.full((size, size, images.pixels.channels), GREY, dtype), {}
    maps: dict[str, Array] = {}
    for kind, has_map in chosen.has_map.items():
        if has_map[number]:
            assert images.maps is not None
            try:
                values = MAP_KINDS[kind].decode_for(images.maps.read(kind, number)[0], *still_size(image))
                maps[kind] = crop_map(values, still_size(image), size, size)
            except ShardError as error:
                images.unusable.add(printable(f"cannot use the {kind} map of image {number} of {images.name}: {error}"))
    return centre_crop(image, size, size), maps
