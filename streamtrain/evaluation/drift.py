"""Drift of a continued run: compares features of the evaluation images with the features at the start."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shards.format.files import write_whole
from streamtrain.engine.runtime import Runtime
from streamtrain.evaluation.knn import Rows
from streamtrain.ops.collectives import SharedFailure, gather_rows, sum_over_ranks
from streamtrain.run.directory import START_FEATURES_NAME

logger = logging.getLogger(__name__)


class Images(Protocol):
    """A train and a test set, such as ``Study``.

    Attributes:
        train, test: this rank's features and labels.
        counts: numbers of train and test images on all ranks.
        identity: text that changes with the images.
    """

    @property
    def train(self) -> Rows: ...

    @property
    def test(self) -> Rows: ...

    @property
    def counts(self) -> tuple[int, int]: ...

    @property
    def identity(self) -> str: ...


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return the linear CKA (Kornblith et al. 2019) of features ``[N, D]`` and ``[N, E]``, spread over ranks by rows.

    It is 1 if the features differ only by a rotation, a scale and a shift, and 0 if either is constant.
    """
    count = sum_over_ranks(torch.tensor([float(len(first))], dtype=torch.float64, device=first.device))
    first, second = (one.double() - sum_over_ranks(one.double().sum(0)) / count for one in (first, second))

    def energy(left: Tensor, right: Tensor) -> float:
        return float(sum_over_ranks(left.T @ right).square().sum())

    own = (energy(first, first) * energy(second, second)) ** 0.5
    return energy(first, second) / own if own > 0.0 else 0.0


def mean_distance(first: Tensor, second: Tensor) -> float:
    """Return the mean of 1 − cosine similarity of the rows of features ``[N, D]``, spread over ranks by rows."""
    # rounding may give a similarity above 1
    distance = (1.0 - F.cosine_similarity(first.double(), second.double(), dim=1)).clamp(min=0.0)
    total = sum_over_ranks(torch.stack([distance.sum(), torch.full_like(distance.sum(), len(distance))]))
    return float(total[0] / total[1])


class StartFeatures:
    """CLS features of all evaluation images at the start, saved in the run directory: fp32, in the order of the images.

    Each evaluation reads the file again, so the features take no memory during training. All methods are collective.
    """

    def __init__(self, run_dir: Path, runtime: Runtime, failure: SharedFailure) -> None:
        self._path, self._runtime, self._failure = run_dir / START_FEATURES_NAME, runtime, failure
        self._has_warned = False

    @property
    def is_saved(self) -> bool:
        """Whether this run has saved features; not collective."""
        return self._path.is_file()

    def save(self, sets: Mapping[str, Images]) -> None:
        """Write the features of each set; a failing disk causes only a warning."""
        tensors = {}
        for name, images in sets.items():
            for part, rows, count in zip(("train", "test"), (images.train, images.test), images.counts, strict=True):
                tensors[f"{name}/{part}"] = _in_order(gather_rows(rows.features), self._runtime.world_size, count)
        if self._runtime.rank == 0:
            try:
                identities = {name: images.identity for name, images in sets.items()}
                write_whole(self._path, save({key: value.cpu() for key, value in tensors.items()}, identities))
            except OSError as error:
                logger.warning("%s cannot be written (%s)", self._path, error.strerror)

    def compare(self, name: str, images: Images) -> dict[str, float]:
        """Return ``cka`` and ``distance`` of the set ``name`` to the start; empty if the file has no features of it."""
        start = self._read(name, images)
        if self._failure.has_occurred(start is None):
            if not self._has_warned:
                logger.warning("%s has no features of these images, so CKA and distance are left out", self._path)
            self._has_warned = True
            return {}
        assert start is not None
        now = torch.cat([images.train.features, images.test.features])
        is_image = torch.cat([images.train.labels, images.test.labels]) >= 0
        start, now = start.to(now.device)[is_image], now[is_image]
        return {"cka": linear_cka(start, now), "distance": mean_distance(start, now)}

    def _read(self, name: str, images: Images) -> Tensor | None:
        """Return this rank's features of the train and the test set, padded like the images, or None."""
        try:
            with safe_open(self._path, "pt") as file:
                saved = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}/")}  # noqa: SIM118
                identity = (file.metadata() or {}).get(name)
        except (OSError, SafetensorError):
            return None
        rank, world_size = self._runtime.rank, self._runtime.world_size
        # older files do not identify their images
        if rank == 0 and identity not in (None, images.identity):
            return None
        own = []
        for part, count in zip(("train", "test"), images.counts, strict=True):
            features = saved.get(f"{name}/{part}")
            if features is None or len(features) != count:
                return None
            own.append(features[(rank + world_size * torch.arange(-(-count // world_size))).clamp(max=count - 1)])
        return torch.cat(own)


def _in_order(gathered: Tensor, world_size: int, count: int) -> Tensor:
    """Return the rows of ``count`` images without padding; rank r had the images r, r + world size, …."""
    return gathered.unflatten(0, (world_size, -1)).transpose(0, 1).flatten(0, 1)[:count].contiguous()
