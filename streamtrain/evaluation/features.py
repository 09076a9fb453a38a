"""Frozen features of labelled images, and normalised pixels as their baseline."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from streamtrain.data.batch import normalise
from streamtrain.data.still_images import centre_crop
from streamtrain.evaluation.images import LabelledImages
from streamtrain.model.vit import VisionTransformer
from streamtrain.run.progress import progress_bar


def crop_batches(images: LabelledImages, resize: int, size: int, batch_size: int, workers: int) -> Iterator[Tensor]:
    """Yield batches uint8 [B, size, size, 3] in order, decoded by ``workers`` threads at most two batches ahead."""

    def load(start: int) -> list[Future[np.ndarray]]:
        stop = min(start + batch_size, len(images))
        return [pool.submit(lambda i: centre_crop(images.decode(i), resize, size), i) for i in range(start, stop)]

    with ThreadPoolExecutor(max_workers=workers) as pool:
        ahead: deque[list[Future[np.ndarray]]] = deque()
        try:
            for start in range(0, len(images), batch_size):
                ahead.append(load(start))
                if len(ahead) > 2:
                    yield _stack(ahead.popleft())
            while ahead:
                yield _stack(ahead.popleft())
        finally:
            for futures in ahead:
                for future in futures:
                    future.cancel()


@torch.inference_mode()
def extract_features(
    model: VisionTransformer,
    images: LabelledImages,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the CLS features of every image, on the model's device and in its precision.

    Args:
        model: the backbone, in eval mode.
        size: side of the input in pixels.
        mean, std: per channel, as in training.
        resize: shorter side in pixels before the centre crop; default: ``size``.

    Returns:
        features fp32 [N, D] and labels int64 [N], on the CPU.
    """
    parameter = next(model.parameters())
    parts = []
    for crops in _read_crops(images, resize or size, size, batch_size, workers, progress):
        inputs = normalise(crops.to(parameter.device, non_blocking=True), mean, std, parameter.dtype)
        parts.append(model.forward_features(inputs).cls.float().cpu())
    return torch.cat(parts), torch.from_numpy(images.labels)


def pixel_features(
    images: LabelledImages,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: int | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the normalised pixels as features: fp32 [N, 3 * size * size], and labels int64 [N]."""
    batches = _read_crops(images, resize or size, size, batch_size, None, progress)
    parts = [normalise(crops, mean, std, torch.float32).flatten(1) for crops in batches]
    return torch.cat(parts), torch.from_numpy(images.labels)


def _read_crops(
    images: LabelledImages, resize: int, size: int, batch_size: int, workers: int | None, progress: bool
) -> Iterator[Tensor]:
    assert resize >= size, (resize, size)
    threads = workers or min(os.cpu_count() or 1, 16)
    with progress_bar(f"reading {images.name}", len(images), "images", shown=progress) as bar:
        for crops in crop_batches(images, resize, size, batch_size, threads):
            yield crops
            bar.update(len(crops))


def _stack(futures: list[Future[np.ndarray]]) -> Tensor:
    return torch.from_numpy(np.stack([future.result() for future in futures]))
