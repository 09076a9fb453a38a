"""Patch features of images that have a map each, a batch at a time, and their bilinear upsampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.format.pixels import Range
from streamtrain.data.batch import normalise
from streamtrain.evaluation.features import batch_spans, ordered_batches, report_unusable
from streamtrain.evaluation.label_maps import Array, MappedImages
from streamtrain.model.vit import VisionTransformer
from streamtrain.run.machine import available_cores
from streamtrain.run.progress import progress_bar

# in a forward, which bounds the memory
MAX_TOKENS = 16_384
MAX_BATCH = 64


@dataclass(frozen=True)
class PatchNetwork:
    """A network, or None for the pixels of each patch themselves, and its preprocessing.

    Attributes:
        size: side of the input in pixels, a multiple of ``patch_size``.
        resize: shorter side before the centre crop.
        mean, std, value_range: per channel, as in training.
        device: of the features.
        batch_size: images per forward; None: limited by ``MAX_TOKENS`` and ``MAX_BATCH``.
    """

    model: VisionTransformer | None
    patch_size: int
    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[Range, ...]
    device: str
    batch_size: int | None = None

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.size // self.patch_size

    @torch.no_grad()
    def features(self, crops: Tensor) -> Tensor:
        """Return the features fp32 [B, patches, D] of crops [B, size, size, channels], row by row."""
        dtype = torch.float32 if self.model is None else next(self.model.parameters()).dtype
        inputs = normalise(crops.to(self.device, non_blocking=True), self.mean, self.std, dtype, self.value_range)
        if self.model is None:
            return F.unfold(inputs, self.patch_size, stride=self.patch_size).transpose(1, 2)
        return self.model.forward_features(inputs).patches.float()


def feature_batches(network: PatchNetwork, images: MappedImages) -> Iterator[tuple[list[int], Tensor, list[Array]]]:
    """Yield the indices of usable images, their features [B, patches, D] and maps [size, size], in order.

    Raises:
        StreamtrainError: a map cannot be used, or too many images are unusable.
    """
    is_usable = torch.zeros(len(images), dtype=torch.bool)
    batch_size = network.batch_size or min(max(MAX_TOKENS // network.side**2, 1), MAX_BATCH)
    spans = list(batch_spans(len(images), batch_size))
    batches = ordered_batches(
        lambda index: (index, *images.crop(index, network.resize, network.size)), spans, min(available_cores(), 16)
    )
    with progress_bar(f"reading {images.images.name}", len(images), "images") as bar:
        for batch in batches:
            usable = [(index, crop, labels) for index, crop, labels in batch if labels is not None]
            if usable:
                indices, crops, maps = zip(*usable, strict=True)
                is_usable[list(indices)] = True
                yield list(indices), network.features(torch.from_numpy(np.stack(crops))), list(maps)
            bar.update(len(batch))
    report_unusable(images.images, is_usable)


def upsampled(values: Tensor, side: int, size: int, rows: range | None = None) -> Tensor:
    """Return patch values [side * side, C] upsampled bilinearly to pixels: [rows, size, C].

    As ``F.interpolate`` without aligned corners. With ``rows`` only these rows of pixels are computed.
    """
    weights = interpolation(side, size).to(values)
    chosen = weights if rows is None else weights[rows.start : rows.stop]
    down = torch.einsum("ri,ijc->rjc", chosen, values.unflatten(0, (side, side)))
    return torch.einsum("sj,rjc->rsc", weights, down)


@cache
def interpolation(side: int, size: int) -> Tensor:
    """Return the weights fp32 [size, side] with which a line of patches becomes a line of pixels."""
    return F.interpolate(torch.eye(side)[None], size=size, mode="linear", align_corners=False)[0].T


def at_pixels(features: Tensor, side: int, size: int, pixels: Tensor) -> Tensor:
    """Return features [side * side, D] upsampled bilinearly at flat pixel indices int64 [P] only: [P, D].

    A linear head of it equals the head's output of each patch, upsampled.
    """
    weights = interpolation(side, size).to(features)
    down, across = weights[pixels // size], weights[pixels % size]
    return (down[:, :, None] * across[:, None]).flatten(1) @ features
