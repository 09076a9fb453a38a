"""Evaluation while training: every rank embeds its part of the images with the sharded teacher."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shards.format.files import write_whole
from shards.format.pixels import to_rgb8
from streamtrain.config.crops import CropsConfig
from streamtrain.config.tree import Config
from streamtrain.data.batch import normalise
from streamtrain.engine.runtime import Runtime
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.drift import StartFeatures
from streamtrain.evaluation.features import crop_batches
from streamtrain.evaluation.held_out import HeldOut
from streamtrain.evaluation.images import LabelledImages
from streamtrain.evaluation.knn import Rows, knn_predict_over_ranks
from streamtrain.evaluation.linear import linear_accuracy
from streamtrain.evaluation.online_dense import measure as measure_maps
from streamtrain.evaluation.retrieval import match_patches, second_view
from streamtrain.evaluation.uncertainty import accuracy_margin
from streamtrain.evaluation.verdict import read_baselines
from streamtrain.model.vit import Features
from streamtrain.ops.collectives import SharedFailure, gather_rows, sum_over_ranks
from streamtrain.run.directory import BASELINES_NAME

logger = logging.getLogger(__name__)
# images per rank for patch retrieval
RETRIEVED = 64
# images per rank in the projector, and the side of their thumbnails in pixels
SHOWN, THUMBNAIL = 400, 32

# the sets of images, and the first parts of their tags
EVALUATION, REFERENCE = "eval", "reference"
# side in pixels to which images are reduced for the baseline of pixels
PIXELS = 32

# [images, side, side, channels] to features; a collective call of all ranks
Embed = Callable[[Tensor], Features]
# yields the items of an iterable unchanged and marks progress at each
Wrap = Callable[[Iterable[Any]], Iterable[Any]]


class Study:
    """The current network and the images; features are computed at first use and cached.

    All methods and properties are collective: every rank uses them in the same order.
    """

    def __init__(
        self, embed: Embed, images: HeldOut, config: Config, runtime: Runtime, wrap: Wrap, failure: SharedFailure
    ) -> None:
        self.embed, self.images, self.config, self.runtime, self.wrap = embed, images, config, runtime, wrap
        self.failure = failure
        # of all ranks
        self.num_unusable = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of train and test images on all ranks."""
        return len(self.images.train), len(self.images.test)

    @property
    def identity(self) -> str:
        """Text that changes with the images and with their preprocessing; not collective."""
        crops = self.config.crops
        parts = (self.images.digest, self.config.square_side, crops.mean, crops.std, crops.value_range)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def train(self) -> Rows:
        return self._rows(self.images.train)

    @cached_property
    def test(self) -> Rows:
        return self._rows(self.images.test)

    def own(self, images: LabelledImages) -> LabelledImages:
        """Return this rank's part of the images; the last image is repeated so that all parts are equally long."""
        world_size = self.runtime.world_size
        indices = self.runtime.rank + world_size * np.arange(-(-len(images) // world_size))
        return images.subset(np.minimum(indices, len(images) - 1), images.name)

    def crops(self, images: LabelledImages) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches [B, side, side, channels] of this rank's images on the device.

        The side is ``Config.square_side``. Also yields bool [B]: False where a grey crop replaces an unusable image.
        """
        size, batch = self.config.square_side, self.config.crops.global_count * self.config.data.micro_batch
        batches = crop_batches(images, size, size, batch, self.runtime.launch.cores)

        def load() -> tuple[Tensor, Tensor]:
            crops, is_usable = next(batches)
            return crops.to(self.runtime.device), is_usable.to(self.runtime.device)

        # every rank has equally many batches
        for _ in self.wrap(range(-(-len(images) // batch))):
            yield self.failure.run(load)

    def _rows(self, images: LabelledImages) -> Rows:
        own, rank, world_size = self.own(images), self.runtime.rank, self.runtime.world_size
        features, usable = [], []
        for crops, is_usable in self.crops(own):
            features.append(self.embed(crops).cls.float())
            usable.append(is_usable)
        labels = torch.from_numpy(own.labels).clone()
        # repeated images are padding
        labels[(len(images) - rank + world_size - 1) // world_size :] = -1
        labels = labels.to(self.runtime.device)
        used = labels.where(torch.cat(usable), -1)
        counts = sum_over_ranks(torch.stack([(used >= 0).sum(), (used != labels).sum()]))
        if not counts[0]:
            reasons = images.unusable.new_reasons()
            raise StreamtrainError(f"no image of {images.name} can be used{reasons and f': {reasons}'}")
        self.num_unusable += int(counts[1])
        return Rows(torch.cat(features), used)


class Evaluator(Protocol):
    """A measurement of the network, called by all ranks; returns the same values on all."""

    def __call__(self, study: Study) -> dict[str, float]: ...


def knn(study: Study) -> dict[str, float]:
    """Return the kNN accuracy for each number of neighbours."""
    predictions, expected = knn_predict_over_ranks(study.train, study.test)
    return {f"knn_{count}": float((guess == expected).double().mean()) for count, guess in predictions.items()}


def linear(study: Study) -> dict[str, float]:
    """Return the accuracy of a linear probe; rank 0 trains it while the others wait."""
    train, test = (_gather(rows) for rows in (study.train, study.test))

    def train_probe() -> float:
        return linear_accuracy(*train, *test).accuracy if study.runtime.rank == 0 else 0.0

    accuracy = torch.tensor([study.failure.run(train_probe)], dtype=torch.float64, device=study.runtime.device)
    return {"linear": float(sum_over_ranks(accuracy))}


def patches(study: Study) -> dict[str, float]:
    """Return the share of patches of a second view that are matched to their origin."""
    few, device = study.own(study.images.test), study.runtime.device
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for crops, is_usable in study.crops(few.subset(np.arange(min(len(few), RETRIEVED)), few.name)):
        views = study.failure.run(lambda crops: (crops, second_view(crops)), crops)
        first, second = (study.embed(view).patches for view in views)
        is_match = match_patches(first, second)[is_usable]
        counts += torch.tensor([float(is_match.sum()), is_match.numel()], dtype=torch.float64, device=device)
    right, total = sum_over_ranks(counts).tolist()
    if not total:
        raise StreamtrainError("no test image can be used")
    return {"patch_retrieval": right / total}


# by their names in evaluation.evaluators; those of maps are in online_dense
EVALUATORS: dict[str, Evaluator] = {"knn": knn, "linear": linear, "patches": patches}
NEED_LABELS = ("knn", "linear")


@dataclass(frozen=True)
class Baselines:
    """Results of the evaluation before the first step, by tag.

    Attributes:
        start: results of the starting network, also on the reference.
        pixels: results of the pixels as features; kNN only.
        train_images, test_images: numbers of images.
        images: ``Study.identity`` of each set by name; empty on ranks other than 0.
        step: completed steps at the start, above 0 after ``--resume``.
        is_trained: whether the starting network was trained.
    """

    start: dict[str, float]
    pixels: dict[str, float]
    train_images: int
    test_images: int
    images: dict[str, str]
    step: int
    is_trained: bool


class OnlineEvaluation:
    """Runs the evaluators of ``evaluation.evaluators`` within their share of the run's time."""

    def __init__(
        self, config: Config, images: HeldOut | None, runtime: Runtime, failure: SharedFailure,
        reference: HeldOut | None = None,
    ) -> None:  # fmt: skip
        """``images``, ``reference``: None disables the evaluation on them."""
        self._config, self._images, self._runtime, self._failure = config, images, runtime, failure
        named = {EVALUATION: images, REFERENCE: reference} if config.evaluation.evaluators else {}
        self._sets = {name: one for name, one in named.items() if one is not None}
        self._start_features = StartFeatures(Path(config.run.dir), runtime, failure)
        # results at the start by tag, for each set; None: drift from them is not reported
        self._start: dict[str, Mapping[str, float] | None] = {}
        self._began, self._seconds = time.monotonic(), 0.0
        # not written yet: a full or failing disk delays it
        self._unwritten: Baselines | None = None
        self._is_margin_logged = False
        self.study: Study | None = None

    @property
    def share(self) -> float:
        """Share of the time since the start that evaluation has taken."""
        return self._seconds / max(time.monotonic() - self._began, 1e-9)

    def run(self, embed: Embed, wrap: Wrap) -> dict[str, float]:
        """Return metrics by tag, and set ``study``; no metrics if evaluation is over its share of the time."""
        if not self._sets or self._is_over_budget():
            return {}
        began = time.monotonic()
        metrics: dict[str, float] = {}
        try:
            for name in self._sets:
                study = self._study(name, embed, wrap)
                results = self._evaluate(name, study)
                metrics |= _by_tag(name, study, results) | self._drift(name, study, results)
                if name == EVALUATION:
                    self.study = study
                    self._log_margin(results)
        finally:
            seconds = time.monotonic() - began
            self._seconds += seconds
            self._log_unusable()
        self._write_baselines()
        return metrics | {"eval/seconds": seconds, "eval/time_share": self.share}

    def run_before_training(self, embed: Embed, wrap: Wrap, step: int, is_trained: bool) -> Baselines | None:
        """Evaluate the starting network and the pixels, set ``study`` and write ``baselines.json``.

        This time does not count against ``evaluation.max_share``.

        Args:
            step: completed steps.
            is_trained: whether the network comes from another run; with ``init.weights`` it also counts as trained.
        """
        if not self._sets:
            return None
        is_trained = is_trained or self._config.init.weights is not None
        has_drift = is_trained or self._config.evaluation.reference is not None
        start: dict[str, float] = {}
        by_pixels: dict[str, float] = {}
        studies = {name: self._study(name, embed, wrap) for name in self._sets}
        try:
            for name, study in studies.items():
                start |= _by_tag(name, study, self._evaluate(name, study))
            if has_drift:
                self._start_features.save(studies)
            if self._images is not None and self._images.is_labelled and "knn" in self._config.evaluation.evaluators:
                pixels = self._study(EVALUATION, partial(_embed_pixels, self._config.crops), wrap)
                by_pixels = _by_tag(EVALUATION, pixels, knn(pixels))
        finally:
            self._log_unusable()
        identities = {name: study.identity for name, study in studies.items()} if self._runtime.rank == 0 else {}
        self.study, self._began = studies.get(EVALUATION), time.monotonic()
        self._start = dict.fromkeys(studies, start if has_drift else None)
        num_images = self.study.counts if self.study is not None else (0, 0)
        baselines = self._unwritten = Baselines(start, by_pixels, *num_images, identities, step, is_trained)
        self._write_baselines()
        return baselines

    def _study(self, name: str, embed: Embed, wrap: Wrap) -> Study:
        return Study(embed, self._sets[name], self._config, self._runtime, wrap, self._failure)

    def _evaluate(self, name: str, study: Study) -> dict[str, float]:
        """Return the results of all evaluators that the set ``name`` has labels or maps for."""
        results: dict[str, float] = {}
        for evaluator in self._config.evaluation.evaluators:
            if evaluator in EVALUATORS and (self._sets[name].is_labelled or evaluator not in NEED_LABELS):
                results |= EVALUATORS[evaluator](study)
        return results | measure_maps(study)

    def _drift(self, name: str, study: Study, results: Mapping[str, float]) -> dict[str, float]:
        """Return by tag the differences between ``results`` and the start, and the drift of the features."""
        if name not in self._start:
            # in a resumed run rank 0 reads the start, because a shared folder may show ranks different contents
            content = [self._read_start(name, study) if self._runtime.rank == 0 else None]
            dist.broadcast_object_list(content, 0)
            self._start[name] = content[0]
        if (start := self._start[name]) is None:
            return {}
        prefix = "drift/" if name == EVALUATION else f"drift/{name}/"
        known = {metric: start.get(f"{name}/{metric}") for metric in results}
        changes = {metric: results[metric] - value for metric, value in known.items() if value is not None}
        values = changes | self._start_features.compare(name, study)
        return {f"{prefix}{metric}": value for metric, value in values.items()}

    def _read_start(self, name: str, study: Study) -> Mapping[str, float] | None:
        """Return the results at the start by tag; None if drift from them is not reported.

        Drift is not reported if the start was untrained and there is no reference, or, with a warning, if the images
        have changed.
        """
        baselines, evaluation = read_baselines(Path(self._config.run.dir)), self._config.evaluation
        is_trained = baselines.is_trained
        if is_trained is None:
            # runs of earlier versions saved features only if the start was trained
            is_trained = self._config.init.weights is not None or self._start_features.is_saved
        if not is_trained and evaluation.reference is None:
            return None
        # runs of earlier versions do not identify their images
        if baselines.images.get(name) in (None, study.identity):
            return baselines.start
        is_stopping = evaluation.stop_if_below is not None and (name == REFERENCE or evaluation.reference is None)
        source = evaluation.reference if name == REFERENCE else evaluation.train or self._config.data.shards_text
        logger.warning(
            "the evaluation images of %s or their preprocessing differ from those at the start, so their drift is left "
            "out%s", source, " and evaluation.stop_if_below has no effect" if is_stopping else "",
        )  # fmt: skip
        return None

    def _write_baselines(self) -> None:
        """Write ``baselines.json`` on rank 0 if it is due; if that fails, the next evaluation tries again."""
        if self._unwritten is not None and self._runtime.rank == 0:
            content = json.dumps(asdict(self._unwritten), indent=1).encode()
            with suppress(OSError):
                write_whole(Path(self._config.run.dir) / BASELINES_NAME, content)
                self._unwritten = None

    def _log_margin(self, results: dict[str, float]) -> None:
        """Log the 95 % interval of the accuracies once."""
        accuracies = [value for name, value in results.items() if name == "linear" or name.startswith("knn_")]
        if accuracies and not self._is_margin_logged:
            assert self._images is not None
            count = len(self._images.test)
            margin = max(accuracy_margin(accuracy, count) for accuracy in accuracies)
            logger.info(
                "evaluation: accuracies on %d test images have a 95%% interval of ± %.1f points", count, 100 * margin
            )
            self._is_margin_logged = True

    def _log_unusable(self) -> None:
        """Log the images that this rank found unusable since the last evaluation."""
        for images in (images for one in self._sets.values() for images in (one.train, one.test)):
            if reasons := images.unusable.new_reasons():
                logger.warning("images left out of the evaluation: %s", reasons)

    def thumbnails(self) -> tuple[Tensor, list[str], Tensor] | None:
        """Return this rank's test features [N, D] of the last study, class names and thumbnails, for the projector."""
        study = self.study
        if study is None or "test" not in vars(study):
            return None
        own = study.own(study.images.test)
        count = min(SHOWN, len(own))
        few = own.subset(np.arange(count), own.name)
        pictures = crop_batches(few, THUMBNAIL, THUMBNAIL, 64, self._runtime.launch.cores)
        names = [few.class_name(label) for label in few.labels.tolist()]
        ranges, channels = self._config.crops.value_range, self._config.monitor.panel_channels
        shown = to_rgb8(torch.cat([crops for crops, _ in pictures]).numpy(), ranges, channels)
        return study.test.features[:count].cpu(), names, torch.from_numpy(shown)

    def _is_over_budget(self) -> bool:
        """Return on all ranks whether rank 0 has spent too much time; the first evaluation always runs."""
        is_over = self.share > self._config.evaluation.max_share and self._seconds > 0
        flag = torch.full((1,), float(is_over and self._runtime.rank == 0), device=self._runtime.device)
        return bool(sum_over_ranks(flag))


def _by_tag(name: str, study: Study, results: Mapping[str, float]) -> dict[str, float]:
    """Return the results on the set ``name`` by tag."""
    figures = {f"{name}/{metric}": value for metric, value in results.items()}
    return figures | ({f"{name}/unusable_images": float(study.num_unusable)} if study.num_unusable else {})


def _embed_pixels(config: CropsConfig, crops: Tensor) -> Features:
    """Return the normalised pixels, reduced to at most ``PIXELS`` a side, in place of CLS features."""
    pixels = normalise(crops, config.mean, config.std, torch.float32, config.value_range)
    if pixels.shape[-1] > PIXELS:
        pixels = F.interpolate(pixels, (PIXELS, PIXELS), mode="area")
    cls = pixels.flatten(1)
    return Features(cls, cls[:, None, :0], cls[:, None, :0])


def _gather(rows: Rows) -> tuple[Tensor, Tensor]:
    features, labels = gather_rows(rows.features), gather_rows(rows.labels)
    return features[labels >= 0], labels[labels >= 0]


def embed_maps(embed: Embed, images: Sequence[Tensor], patch_size: int) -> list[Tensor]:
    """Return normalised patch features fp32 [h, w, D], on the CPU, of images uint8 [height, width, 3] of one size."""
    stacked = torch.stack(list(images))
    grid = (stacked.shape[1] // patch_size, stacked.shape[2] // patch_size)
    features = F.normalize(embed(stacked).patches.float(), dim=-1)
    return [one.unflatten(0, grid).cpu() for one in features]
