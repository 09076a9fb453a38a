"""Frozen features of labelled images, and normalised pixels as their baseline."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from shards.format.pixels import Range
from streamtrain.data.batch import UNIT_RANGE, normalise
from streamtrain.data.still_images import centre_crop
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.images import LabelledImages
from streamtrain.model.vit import VisionTransformer
from streamtrain.run.machine import available_cores
from streamtrain.run.progress import progress_bar

GREY = 128
# a command fails if more images are unusable
MAX_UNUSABLE_SHARE = 0.1
Item = TypeVar("Item")
logger = logging.getLogger(__name__)


def decode_crop(images: LabelledImages, index: int, resize: int, size: int) -> tuple[np.ndarray, bool]:
    """Return the centre crop [size, size, channels] of an image, or a grey one and False if the image is unusable."""
    image = images.decode_if_usable(index)
    if image is None:
        dtype = np.uint8 if images.pixels.dtype == "uint8" else np.float32
        return np.full((size, size, images.pixels.channels), GREY, dtype), False
    return centre_crop(image, resize, size), True


def crop_batches(
    images: LabelledImages, resize: int, size: int, batch_size: int, workers: int, spans: Iterable[range] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in order, as ``ordered_batches``.

    ``spans`` are the images of each batch; None: all images, ``batch_size`` at a time.

    Each batch is [B, size, size, channels], uint8 or float32, and bool [B]: False where a grey crop replaces an
    unusable image.
    """
    if spans is None:
        spans = batch_spans(len(images), batch_size)
    for batch in ordered_batches(lambda index: decode_crop(images, index, resize, size), spans, workers):
        crops, is_usable = zip(*batch, strict=True)
        yield torch.from_numpy(np.stack(crops)), torch.tensor(is_usable)


def batch_spans(count: int, batch_size: int) -> Iterator[range]:
    return (range(start, min(start + batch_size, count)) for start in range(0, count, batch_size))


def ordered_batches(read: Callable[[int], Item], spans: Iterable[range], workers: int) -> Iterator[list[Item]]:
    """Yield the results of ``read`` for each span of indices, in order, from threads at most two batches ahead."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        ahead: deque[list[Future[Item]]] = deque()
        try:
            for span in spans:
                ahead.append([pool.submit(read, index) for index in span])
                if len(ahead) > 2:
                    yield [future.result() for future in ahead.popleft()]
            while ahead:
                yield [future.result() for future in ahead.popleft()]
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()


# not inference_mode: autograd refuses to save its tensors, and a probe may need their products
@torch.no_grad()
def compute_features(
    model: VisionTransformer,
    images: LabelledImages,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    value_range: Sequence[Range] = UNIT_RANGE,
    resize: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the CLS features of all images, on the model's device and in its precision.

    Args:
        model: the backbone, in eval mode.
        size: side of the input in pixels.
        mean, std, value_range: per channel, as in training.
        resize: shorter side in pixels before the centre crop; default: ``size``.

    Returns:
        features fp32 [N, D], and bool [N]: False where a grey crop replaces an unusable image; both on the CPU.
    """
    parameter = next(model.parameters())
    parts, usable = [], []
    for crops, is_usable in _read_crops(images, resize or size, size, batch_size, workers, progress):
        inputs = normalise(crops.to(parameter.device, non_blocking=True), mean, std, parameter.dtype, value_range)
        parts.append(model.forward_features(inputs).cls.float().cpu())
        usable.append(is_usable)
    return torch.cat(parts), torch.cat(usable)


def read_pixels(
    images: LabelledImages, *, size: int, resize: int | None = None, batch_size: int = 256, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the pixels of all images, uint8 [N, size * size * 3], and bool [N] as ``compute_features``."""
    parts, usable = [], []
    for crops, is_usable in _read_crops(images, resize or size, size, batch_size, None, progress):
        parts.append(crops.flatten(1))
        usable.append(is_usable)
    return torch.cat(parts), torch.cat(usable)


def pixel_features(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return pixels, uint8 as from ``read_pixels``, as features: normalised, fp32 [N, 3 * size * size]."""
    side = round((pixels.shape[1] / 3) ** 0.5)
    return normalise(pixels.unflatten(1, (side, side, 3)), mean, std, torch.float32).flatten(1)


def report_unusable(images: LabelledImages, is_usable: Tensor) -> None:
    """Log which images are unusable, given bool [N].

    Raises:
        StreamtrainError: if too many images are unusable.
    """
    if not (num_unusable := int((~is_usable).sum())):
        return
    reasons = images.unusable.new_reasons()
    text = f"{num_unusable} of {len(images)} images of {images.name} could not be used: {reasons}"
    if num_unusable > MAX_UNUSABLE_SHARE * len(images):
        raise StreamtrainError(f"{text}; more than {MAX_UNUSABLE_SHARE:.0%} is too many to evaluate the others")
    logger.warning(text)


def _read_crops(
    images: LabelledImages, resize: int, size: int, batch_size: int, workers: int | None, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    assert resize >= size, (resize, size)
    threads = workers or min(available_cores(), 16)
    with progress_bar(f"reading {images.name}", len(images), "images", shown=progress) as bar:
        for crops, is_usable in crop_batches(images, resize, size, batch_size, threads):
            yield crops, is_usable
            bar.update(len(crops))
