"""Crops become the finished views of a batch: on the GPU from DALI's crops, on the CPU from its decoded images.

DALI's resampler is made for GPUs; on a CPU torch's vectorised one takes a tenth of its time for the same bicubic
antialiased crop, which is why a CPU crops here. Everything after the crop is one code for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.data.appearance import Appearance, adjust
from streamtrain.data.augment import ViewParameters

Result = TypeVar("Result")


def finish(crops: Sequence[Tensor], views: ViewParameters, first: int) -> Tensor:
    """Colour the crops of some views, uint8 [B, S, S, 3] each, starting with view ``first``: [views * B, S, S, 3]."""
    planes = torch.stack(torch.cat(list(crops)).unbind(-1), dim=1)
    looks = _looks(views, first, len(crops), planes.shape[-1])
    return torch.stack(adjust(planes, looks).unbind(1), dim=-1)


def _looks(views: ViewParameters, first: int, count: int, size: int) -> Appearance:
    """That of ``count`` views from ``first`` on, view-major."""
    chosen = slice(first, first + count)
    color = np.ascontiguousarray(views.color[:, chosen].swapaxes(0, 1)).reshape(-1, 4)
    return Appearance.of(color, views.sigma[:, chosen].T.reshape(-1), views.solarize[:, chosen].T.reshape(-1), size)


@dataclass(frozen=True)
class _Group:
    """Views of one size: the first one's number, where they go (uint8 [views, B, S, S, 3]), their colours if any."""

    first: int
    out: Tensor
    looks: Appearance | None


class CpuViews:
    """Crops and colours decoded images on a CPU, one sample a task, on a few threads."""

    def __init__(self, crops: CropsConfig, threads: int) -> None:
        self._crops = crops
        # a sample is small: the threads work on different ones, and torch's own stay out of it
        process_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "views", initializer=_compute_alone)
        # all of them are to be there before the setting, which is each thread's own, is made again for later ones
        everyone = Barrier(threads)
        list(self._pool.map(lambda _: everyone.wait(), range(threads)))
        torch.set_num_threads(process_threads)

    def make(
        self, images: Sequence[Tensor], views: ViewParameters, sizes: CropSizes
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of B images uint8 [H, W, 3]: uint8 view-major [V*B, S, S, 3], [L*B, s, s, 3], Gram's [V*B, g, g, 3]."""
        crops = self._crops
        groups = []
        for first, count, size, coloured in (
            (0, crops.global_count, sizes.global_size, True),
            (crops.global_count, crops.local_count, sizes.local_size, True),
            *([(0, crops.global_count, sizes.gram_size, False)] if sizes.gram_size else []),
        ):
            out = torch.empty(count, len(images), size, size, 3, dtype=torch.uint8)
            groups.append(_Group(first, out, _looks(views, first, count, size) if coloured else None))
        tasks = [self._pool.submit(_make_sample, image, views, row, groups) for row, image in enumerate(images)]
        for task in tasks:
            task.result()
        of_global, of_local, *of_gram = (group.out.flatten(0, 1) for group in groups)
        return of_global, of_local, of_gram[0] if of_gram else None

    def submit(self, work: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Other small work for these threads: torch's own would burn more time waiting for each other than it takes."""
        return self._pool.submit(work, *arguments)

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)


def _compute_alone() -> None:
    """Keep torch's operations of this thread within it."""
    # a thread takes over the process's number when it first asks for its own, even if that has been set before
    torch.get_num_threads()
    torch.set_num_threads(1)


def _make_sample(image: Tensor, views: ViewParameters, row: int, groups: Sequence[_Group]) -> None:
    """All views of one image [H, W, 3] into ``out[:, row]`` of each group."""
    size = np.array(image.shape[:2])
    starts = np.rint(views.roi_start[row] * size).astype(int).tolist()
    ends = np.rint(views.roi_end[row] * size).astype(int).tolist()
    mirrored = views.mirror[row].tolist()
    planes = image.permute(2, 0, 1)[None]
    for group in groups:
        count, batch_size, side, _, _ = group.out.shape
        # in what colours are computed in
        crops = torch.empty(count, 3, side, side, dtype=torch.float32 if group.looks else torch.uint8)
        for view, place in enumerate(crops, group.first):
            crop(planes, starts[view], ends[view], mirror=mirrored[view], out=place)
        if count:
            finished = adjust(crops, group.looks.rows(slice(row, None, batch_size))) if group.looks else crops
            for channel in range(3):
                group.out[:, row, ..., channel] = finished[:, channel]


def crop(planes: Tensor, start: Sequence[int], end: Sequence[int], *, mirror: bool, out: Tensor) -> None:
    """The box from ``start`` to ``end`` (y, x in pixels) of uint8 [1, 3, H, W], resized to fill ``out`` [3, S, S]."""
    box = planes[:, :, start[0] : end[0], start[1] : end[1]]
    resized = interpolate(box, size=out.shape[1:], mode="bicubic", antialias=True)[0]
    out.copy_(resized.flip(2) if mirror else resized)
