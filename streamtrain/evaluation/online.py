"""Evaluation while a run trains: every rank embeds its part of the images with the sharded teacher."""

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
from streamtrain.evaluation.retrieval import matched, second_view
from streamtrain.model.vit import Features
from streamtrain.ops.collectives import gather_rows, sum_over_ranks

logger = logging.getLogger(__name__)
# images of a rank whose patches are sought in another view of them
RETRIEVED = 64
# images of a rank that the projector shows, and the side of their thumbnails
SHOWN, THUMBNAIL = 400, 32

# uint8 [images, side, side, 3] to their features; all ranks call it alike
Embed = Callable[[Tensor], Features]
# lets each item through, as a sign of life
Beating = Callable[[Iterable[Tensor]], Iterable[Tensor]]


class Study:
    """The network as it is now and the images; features are computed once, for whoever asks first.

    Whatever is asked for is asked for by all ranks.
    """

    def __init__(
        self, embed: Embed, images: HeldOut | None, config: Config, rank: int, world_size: int, device: torch.device,
        workers: int, beating: Beating,
    ) -> None:
        self.embed, self.images, self.config, self.rank, self.world_size = embed, images, config, rank, world_size
        self.device, self._workers, self._beating = device, workers, beating

    @cached_property
    def train(self) -> Rows:
        """Features of the images to learn from."""
        assert self.images is not None
        return self._rows(self.images.train)

    @cached_property
    def test(self) -> Rows:
        """Features of the images to predict."""
        assert self.images is not None
        return self._rows(self.images.test)

    def own(self, images: LabelledImages) -> LabelledImages:
        """This rank's part, as many on each rank: the last ones are repeated where the images do not divide."""
        count = -(-len(images) // self.world_size)
        indices = self.rank + self.world_size * np.arange(count)
        return images.subset(np.minimum(indices, len(images) - 1), images.name)

    def crops(self, images: LabelledImages) -> Iterator[Tensor]:
        """uint8 [B, side, side, 3] of the images, at the size of the global crops, on the CPU."""
        size, batch = self.config.crops.global_size, self.config.crops.global_count * self.config.data.micro_batch
        yield from self._beating(crop_batches(images.lenient(), size, size, batch, self._workers))

    def _rows(self, images: LabelledImages) -> Rows:
        own = self.own(images)
        features = [self.embed(crops.to(self.device)).cls.float() for crops in self.crops(own)]
        labels = torch.from_numpy(own.labels).clone()
        # what stands in for images that this rank lacks
        labels[(len(images) - self.rank + self.world_size - 1) // self.world_size :] = -1
        return Rows(torch.cat(features), labels.to(self.device))


class Evaluator(Protocol):
    """One way to measure a network; called by all ranks, which get the same figures."""

    def __call__(self, study: Study) -> dict[str, float]: ...


def knn(study: Study) -> dict[str, float]:
    """Accuracy of weighted nearest neighbours."""
    predictions, wanted = knn_predict_over_ranks(study.train, study.test)
    return {f"knn_{count}": float((guess == wanted).double().mean()) for count, guess in predictions.items()}


def linear(study: Study) -> dict[str, float]:
    """Accuracy of linear classifiers, all learning rates at once; rank 0 trains them, the others wait."""
    train, test = (_gathered(rows) for rows in (study.train, study.test))
    score = torch.zeros(1, dtype=torch.float64, device=study.device)
    if study.rank == 0:
        try:
            score += linear_accuracy(*train, *test).accuracy
        except Exception:
            # the other ranks wait for the sum, after which all of them raise
            logger.warning("the linear probe failed", exc_info=True)
            score += math.nan
    accuracy = float(sum_over_ranks(score, None))
    if math.isnan(accuracy):
        raise StreamtrainError("the linear probe failed on rank 0")
    return {"linear": accuracy}


def patches(study: Study) -> dict[str, float]:
    """Share of the patches of a second view that find where they came from."""
    assert study.images is not None
    few = study.own(study.images.test)
    counts = torch.zeros(2, dtype=torch.float64, device=study.device)
    for crops in study.crops(few.subset(np.arange(min(len(few), RETRIEVED)), few.name)):
        first, second = (study.embed(view.to(study.device)).patches for view in (crops, second_view(crops)))
        found = matched(first, second)
        counts += torch.tensor([float(found.sum()), found.numel()], dtype=torch.float64, device=study.device)
    right, total = sum_over_ranks(counts, None).tolist()
    return {"patch_retrieval": right / total}


# by the names of evaluation.evaluators
EVALUATORS: dict[str, Evaluator] = {"knn": knn, "linear": linear, "patches": patches}


class OnlineEvaluation:
    """Runs the evaluators that are chosen, at their interval and within their share of the time."""

    def __init__(
        self, config: Config, images: HeldOut | None, rank: int, world_size: int, device: torch.device, workers: int,
    ) -> None:
        """``images``: None where there are none, and nothing is evaluated."""
        self._config, self._images = config, images
        self._rank, self._world_size, self._device, self._workers = rank, world_size, device, workers
        self._began, self._seconds, self._max_share = time.monotonic(), 0.0, config.evaluation.max_share
        self.study: Study | None = None

    @property
    def share(self) -> float:
        """Of this start's time so far, spent here."""
        return self._seconds / max(time.monotonic() - self._began, 1e-9)

    def run(self, embed: Embed, beating: Beating) -> dict[str, float]:
        """The figures by tag; none where the evaluations so far have taken more than their share.

        ``study`` is the last one afterwards, with what it has computed.
        """
        if self._images is None or not self._config.evaluation.evaluators or self._over():
            return {}
        began = time.monotonic()
        study = Study(
            embed, self._images, self._config, self._rank, self._world_size, self._device, self._workers, beating
        )
        found: dict[str, float] = {}
        for name in self._config.evaluation.evaluators:
            found |= EVALUATORS[name](study)
        self.study = study
        seconds = time.monotonic() - began
        self._seconds += seconds
        figures = {f"eval/{name}": value for name, value in found.items()}
        return figures | {"eval/seconds": seconds, "eval/time_share": self.share}

    def thumbnails(self, limit: int = SHOWN) -> tuple[Tensor, list[str], Tensor] | None:
        """For the projector: this rank's test features [N, D] of the last study, with class names and thumbnails."""
        study = self.study
        if study is None or study.images is None or "test" not in vars(study):
            return None
        count = min(limit, int((study.test.labels >= 0).sum()))
        own = study.own(study.images.test)
        few = own.subset(np.arange(count), own.name).lenient()
        pictures = crop_batches(few, THUMBNAIL, THUMBNAIL, 64, self._workers)
        names = [few.classes[label] if few.classes else str(label) for label in few.labels.tolist()]
        return study.test.features[:count].cpu(), names, torch.cat(list(pictures))

    def _over(self) -> bool:
        """Whether rank 0, by whose clock all go, has spent too much; the first time is free."""
        return self._of_rank_0(self._seconds > 0 and self.share > self._max_share)

    def _of_rank_0(self, answer: bool) -> bool:
        said = torch.full((1,), float(answer and self._rank == 0), device=self._device)
        return bool(sum_over_ranks(said, None))


def _gathered(rows: Rows) -> tuple[Tensor, Tensor]:
    """All ranks' rows."""
    features, labels = gather_rows(rows.features, None), gather_rows(rows.labels, None)
    return features[labels >= 0], labels[labels >= 0]


def embed_maps(embed: Embed, images: Sequence[Tensor], patch_size: int) -> list[Tensor]:
    """Normalised patch features fp32 [h, w, D], on the CPU, of images uint8 [height, width, 3], all of one size."""
    stacked = torch.stack(list(images))
    grid = (stacked.shape[1] // patch_size, stacked.shape[2] // patch_size)
    patches_found = F.normalize(embed(stacked).patches.float(), dim=-1)
    return [one.unflatten(0, grid).cpu() for one in patches_found]
