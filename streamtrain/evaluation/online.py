"""Evaluation while training: every rank embeds its part of the images with the sharded teacher."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.features import crop_batches
from streamtrain.evaluation.held_out import HeldOut
from streamtrain.evaluation.images import LabelledImages
from streamtrain.evaluation.knn import Rows, knn_predict_over_ranks
from streamtrain.evaluation.linear import linear_accuracy
from streamtrain.evaluation.retrieval import match_patches, second_view
from streamtrain.model.vit import Features
from streamtrain.ops.collectives import gather_rows, sum_over_ranks

logger = logging.getLogger(__name__)
# images per rank for patch retrieval
RETRIEVED = 64
# images per rank in the projector, and the side of their thumbnails in pixels
SHOWN, THUMBNAIL = 400, 32

# uint8 [images, side, side, 3] to features; a collective call of all ranks
Embed = Callable[[Tensor], Features]
# yields the items of an iterable unchanged and marks progress at each
KeepAlive = Callable[[Iterable[Tensor]], Iterable[Tensor]]


class Study:
    """The current network and the images; features are computed at first use and cached.

    All methods and properties are collective: every rank uses them in the same order.
    """

    def __init__(
        self, embed: Embed, images: HeldOut | None, config: Config, rank: int, world_size: int, device: torch.device,
        workers: int, keep_alive: KeepAlive,
    ) -> None:  # fmt: skip
        self.embed, self.images, self.config, self.rank, self.world_size = embed, images, config, rank, world_size
        self.device, self._workers, self._keep_alive = device, workers, keep_alive

    @cached_property
    def train(self) -> Rows:
        assert self.images is not None
        return self._rows(self.images.train)

    @cached_property
    def test(self) -> Rows:
        assert self.images is not None
        return self._rows(self.images.test)

    def own(self, images: LabelledImages) -> LabelledImages:
        """Return this rank's part of the images; the last image is repeated so that all parts are equally long."""
        count = -(-len(images) // self.world_size)
        indices = self.rank + self.world_size * np.arange(count)
        return images.subset(np.minimum(indices, len(images) - 1), images.name)

    def crops(self, images: LabelledImages) -> Iterator[Tensor]:
        """Yield batches uint8 [B, side, side, 3] of the images at the size of the global crops, on the CPU."""
        size, batch = self.config.crops.global_size, self.config.crops.global_count * self.config.data.micro_batch
        yield from self._keep_alive(crop_batches(images.lenient(), size, size, batch, self._workers))

    def _rows(self, images: LabelledImages) -> Rows:
        own = self.own(images)
        features = [self.embed(crops.to(self.device)).cls.float() for crops in self.crops(own)]
        labels = torch.from_numpy(own.labels).clone()
        # repeated images are padding
        labels[(len(images) - self.rank + self.world_size - 1) // self.world_size :] = -1
        return Rows(torch.cat(features), labels.to(self.device))


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
    score = torch.zeros(1, dtype=torch.float64, device=study.device)
    if study.rank == 0:
        try:
            score += linear_accuracy(*train, *test).accuracy
        except Exception:
            # the other ranks wait for the sum, after which all of them raise
            logger.warning("the linear probe failed", exc_info=True)
            score += math.nan
    accuracy = float(sum_over_ranks(score))
    if math.isnan(accuracy):
        raise StreamtrainError("the linear probe failed on rank 0")
    return {"linear": accuracy}


def patches(study: Study) -> dict[str, float]:
    """Return the share of patches of a second view that are matched to their origin."""
    assert study.images is not None
    few = study.own(study.images.test)
    counts = torch.zeros(2, dtype=torch.float64, device=study.device)
    for crops in study.crops(few.subset(np.arange(min(len(few), RETRIEVED)), few.name)):
        first, second = (study.embed(view.to(study.device)).patches for view in (crops, second_view(crops)))
        is_match = match_patches(first, second)
        counts += torch.tensor([float(is_match.sum()), is_match.numel()], dtype=torch.float64, device=study.device)
    right, total = sum_over_ranks(counts).tolist()
    return {"patch_retrieval": right / total}


# by their names in evaluation.evaluators
EVALUATORS: dict[str, Evaluator] = {"knn": knn, "linear": linear, "patches": patches}


class OnlineEvaluation:
    """Runs the evaluators of ``evaluation.evaluators`` within their share of the run's time."""

    def __init__(
        self, config: Config, images: HeldOut | None, rank: int, world_size: int, device: torch.device, workers: int
    ) -> None:
        """``images``: None disables the evaluation."""
        self._config, self._images = config, images
        self._rank, self._world_size, self._device, self._workers = rank, world_size, device, workers
        self._began, self._seconds, self._max_share = time.monotonic(), 0.0, config.evaluation.max_share
        self.study: Study | None = None

    @property
    def share(self) -> float:
        """Share of the time since the start that evaluation has taken."""
        return self._seconds / max(time.monotonic() - self._began, 1e-9)

    def run(self, embed: Embed, keep_alive: KeepAlive) -> dict[str, float]:
        """Return metrics by tag, and set ``study``; no metrics if evaluation is over its share of the time."""
        if self._images is None or not self._config.evaluation.evaluators or self._is_over_budget():
            return {}
        began = time.monotonic()
        study = Study(
            embed, self._images, self._config, self._rank, self._world_size, self._device, self._workers, keep_alive
        )
        results: dict[str, float] = {}
        for name in self._config.evaluation.evaluators:
            results |= EVALUATORS[name](study)
        self.study = study
        seconds = time.monotonic() - began
        self._seconds += seconds
        figures = {f"eval/{name}": value for name, value in results.items()}
        return figures | {"eval/seconds": seconds, "eval/time_share": self.share}

    def thumbnails(self) -> tuple[Tensor, list[str], Tensor] | None:
        """Return this rank's test features [N, D] of the last study, class names and thumbnails, for the projector."""
        study = self.study
        if study is None or study.images is None or "test" not in vars(study):
            return None
        count = min(SHOWN, int((study.test.labels >= 0).sum()))
        own = study.own(study.images.test)
        few = own.subset(np.arange(count), own.name).lenient()
        pictures = crop_batches(few, THUMBNAIL, THUMBNAIL, 64, self._workers)
        names = [few.classes[label] if few.classes else str(label) for label in few.labels.tolist()]
        return study.test.features[:count].cpu(), names, torch.cat(list(pictures))

    def _is_over_budget(self) -> bool:
        """Return on all ranks whether rank 0 has spent too much time; the first evaluation always runs."""
        is_over = self._seconds > 0 and self.share > self._max_share
        flag = torch.full((1,), float(is_over and self._rank == 0), device=self._device)
        return bool(sum_over_ranks(flag))


def _gather(rows: Rows) -> tuple[Tensor, Tensor]:
    features, labels = gather_rows(rows.features), gather_rows(rows.labels)
    return features[labels >= 0], labels[labels >= 0]


def embed_maps(embed: Embed, images: Sequence[Tensor], patch_size: int) -> list[Tensor]:
    """Return normalised patch features fp32 [h, w, D], on the CPU, of images uint8 [height, width, 3] of one size."""
    stacked = torch.stack(list(images))
    grid = (stacked.shape[1] // patch_size, stacked.shape[2] // patch_size)
    features = F.normalize(embed(stacked).patches.float(), dim=-1)
    return [one.unflatten(0, grid).cpu() for one in features]
