"""Turn crops (from DALI on a GPU) or decoded images (on a CPU) into the finished views of a batch.

On a CPU, torch's vectorised resampler takes a tenth of the time of DALI's for the same bicubic antialiased crop, so a
CPU crops here. Colour, blur and solarize are elementwise torch and shared by both devices.

The colour distribution is that of DINO's jitter, grey, blur and solarize, in this order, with one difference:
brightness, contrast (about the crop's mean luma), saturation and hue (a rotation of the chroma plane of YIQ, not HSV)
are composed into one linear map that is clipped and rounded once. The reference draws the order of the four and clips
and rounds after each. The blur is the reference's: separable, a window of 9 pixels, reflected edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from threading import Barrier
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from shards.format.pixels import RGB, PixelFormat
from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.data.augment import NO_SOLARIZE, ViewParameters
from streamtrain.data.perturb import Perturbation, perturb, upload
from streamtrain.errors import UserCodeError

Result = TypeVar("Result")
# crops uint8 [views, 3, H, W] of a row of the batch, and whether they are local -> augmented crops
AugmentRow = Callable[[Tensor, int, bool], Tensor]

BLUR_RADIUS = 4
_LUMA = (0.299, 0.587, 0.114)
_TO_YIQ = np.array([_LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True)
class Appearance:
    """Colour maps, blur kernels and solarize thresholds of N crops, precomputed for many crops at once.

    Attributes:
        table: float32 [N, 12], a 3 x 3 colour matrix, then the shares of the crop's mean red, green and blue that are
            added as grey; None for images other than 8-bit RGB, which are only blurred.
        bands: float32 [N, reach, tile], blur weights of the pixels within reach of a tile for each pixel of the tile.
        is_blurred: bool [N], whether the bands apply.
        solarize: int32 [N], as in ``ViewParameters``.
        perturbation: of images of any channels; None without one.
    """

    table: npt.NDArray[np.float32] | None
    bands: npt.NDArray[np.float32]
    is_blurred: npt.NDArray[np.bool_]
    solarize: npt.NDArray[np.int32]
    perturbation: Perturbation | None = None

    @classmethod
    def from_parameters(
        cls, color: npt.NDArray[np.float32], sigma: npt.NDArray[np.float32], solarize: npt.NDArray[np.int32],
        size: Sequence[int],
    ) -> Appearance:  # fmt: skip
        """Precompute for N crops of ``size`` (height, width); the parameters are those of ``ViewParameters``."""
        return cls(_color_table(color), _blur_bands(sigma, math.gcd(*size, 16)), sigma > 0, solarize)

    @classmethod
    def from_views(
        cls, crops: CropsConfig, views: ViewParameters, first: int, count: int, size: Sequence[int],
        pixels: PixelFormat = RGB,
    ) -> Appearance:  # fmt: skip
        """Precompute for ``count`` views from view ``first`` on, in view-major order."""
        selection = slice(first, first + count)
        color = np.ascontiguousarray(views.color[:, selection].swapaxes(0, 1)).reshape(-1, 4)
        sigma, solarize = (values[:, selection].T.reshape(-1) for values in (views.sigma, views.solarize))
        appearance = cls.from_parameters(color, sigma, solarize, size)
        perturbation = Perturbation.from_views(crops, views, first, count) if crops.is_perturbed else None
        return replace(appearance, table=appearance.table if pixels.is_rgb else None, perturbation=perturbation)

    def rows(self, selection: slice) -> Appearance:
        table = None if self.table is None else self.table[selection]
        perturbation = None if self.perturbation is None else self.perturbation.rows(selection)
        return Appearance(
            table, self.bands[selection], self.is_blurred[selection], self.solarize[selection], perturbation
        )


def apply_appearance(planes: Tensor, appearance: Appearance) -> Tensor:
    """Apply colour, blur, solarize and perturbation to crops [N, 3, H, W] of integer values in 0..255; return uint8.

    Crops of other images are blurred and perturbed in place and returned in their dtype. Performs no host sync. On a
    CPU, call it once per sample: a sample's pixels then do not depend on its batch.
    """
    change = _recolor if appearance.table is not None else _blur_other
    result = change(planes, appearance)
    if appearance.perturbation is not None:
        perturb(result, appearance.perturbation)
    return result


def _recolor(planes: Tensor, appearance: Appearance) -> Tensor:
    assert appearance.table is not None
    values = _map_colors(planes.float(), upload(appearance.table, planes.device))
    if appearance.is_blurred.all():
        values = _blur(values, upload(appearance.bands, planes.device))
    elif appearance.is_blurred.any():
        rows = upload(np.flatnonzero(appearance.is_blurred), planes.device)
        bands = upload(appearance.bands[appearance.is_blurred], planes.device)
        values.index_copy_(0, rows, _blur(values.index_select(0, rows), bands))
    # _map_colors added one half, so truncating rounds; on a CPU, int16 then uint8 takes half the time of uint8 at once
    result = values.to(torch.int16).to(torch.uint8)
    inverted = np.flatnonzero(appearance.solarize < NO_SOLARIZE)
    if len(inverted):
        rows = upload(inverted, planes.device)
        selected = result.index_select(0, rows)
        threshold = upload(appearance.solarize[inverted].astype(np.uint8), planes.device)[:, None, None, None]
        result.index_copy_(0, rows, torch.where(selected >= threshold, 255 - selected, selected))
    return result


def _blur_other(planes: Tensor, appearance: Appearance) -> Tensor:
    """Blur crops [N, channels, H, W], uint8 or float32, in place; the others keep their values exactly."""
    if appearance.is_blurred.any():
        rows = upload(np.flatnonzero(appearance.is_blurred), planes.device)
        bands = upload(appearance.bands[appearance.is_blurred], planes.device)
        blurred = _blur(planes.index_select(0, rows).float(), bands)
        planes.index_copy_(0, rows, blurred if planes.is_floating_point() else blurred.round_().to(planes.dtype))
    return planes


def recolor_views(
    config: CropsConfig, crops: Sequence[Tensor], views: ViewParameters, first: int, pixels: PixelFormat = RGB
) -> Tensor:
    """Apply the appearance of the views from ``first`` on to their crops, [B, H, W, channels] per view.

    Returns [views * B, H, W, channels] of the same dtype.
    """
    planes = torch.stack(torch.cat(list(crops)).unbind(-1), dim=1)
    transpose_views(planes, views, first, len(crops), (2, 3))
    appearance = Appearance.from_views(config, views, first, len(crops), planes.shape[2:], pixels)
    return torch.stack(apply_appearance(planes, appearance).unbind(1), dim=-1)


def transpose_views(crops: Tensor, views: ViewParameters, first: int, count: int, axes: tuple[int, int]) -> None:
    """Exchange rows and columns (``axes``) of the view-major crops of ``count`` views in place, where a view has it."""
    marked = np.flatnonzero(views.transpose[:, first : first + count].T)
    if len(marked):
        rows = upload(marked, crops.device)
        crops.index_copy_(0, rows, crops.index_select(0, rows).transpose(*axes))


class CropError(Exception):
    """The crops of one image cannot be made; ``row`` is its row in the batch."""

    def __init__(self, row: int, error: Exception) -> None:
        super().__init__(f"its crops cannot be made ({type(error).__name__}: {error})")
        self.row = row


@dataclass(frozen=True)
class _ViewGroup:
    """Views of one size: index of the first view, output [views, B, H, W, channels], appearance (None: plain crops)."""

    first: int
    out: Tensor
    appearance: Appearance | None


class CpuViewMaker:
    """Crop and recolour decoded images on a few CPU threads, one task per sample."""

    def __init__(self, crops: CropsConfig, threads: int, pixels: PixelFormat = RGB) -> None:
        self._crops, self._pixels = crops, pixels
        # samples are small, so each thread works on its own sample and torch's intra-op threads stay off
        process_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "views", initializer=_disable_intra_op_threads)
        # set_num_threads below also changes the default of later threads, so start all of the pool's threads first
        barrier = Barrier(threads)
        list(self._pool.map(lambda _: barrier.wait(), range(threads)))
        torch.set_num_threads(process_threads)

    def make_views(
        self, images: Sequence[Tensor], views: ViewParameters, sizes: CropSizes, augment: AugmentRow | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return global, local and Gram crops of B images [H, W, channels], all view-major.

        Shapes are [V*B, height, width, channels], [L*B, height, width, channels] and [V*B, height, width, channels],
        with the heights and widths of ``sizes``; the last is None without a Gram size. Crops of uint8 are uint8, all
        others float32.

        Args:
            augment: applied to the global and to the local crops of each image.

        Raises:
            CropError: the first image whose crops cannot be made.
            UserCodeError: ``augment`` failed.
        """
        crops = self._crops
        groups, channels = [], self._pixels.channels
        dtype = torch.uint8 if self._pixels.dtype == "uint8" else torch.float32
        for first, count, size, has_appearance in (
            (0, crops.global_count, sizes.global_size, True),
            (crops.global_count, crops.local_count, sizes.local_size, True),
            *([(0, crops.global_count, sizes.gram_size, False)] if sizes.gram_size else []),
        ):
            out = torch.empty(count, len(images), *size, channels, dtype=dtype)
            appearance = (
                Appearance.from_views(crops, views, first, count, size, self._pixels) if has_appearance else None
            )
            groups.append(_ViewGroup(first, out, appearance))
        tasks = [
            self._pool.submit(_make_sample, image, views, row, groups, augment) for row, image in enumerate(images)
        ]
        wait(tasks)
        for row, task in enumerate(tasks):
            error = task.exception()
            if isinstance(error, UserCodeError):
                raise error
            if isinstance(error, Exception):
                raise CropError(row, error) from error
        global_crops, local_crops, *gram_crops = (group.out.flatten(0, 1) for group in groups)
        return global_crops, local_crops, gram_crops[0] if gram_crops else None

    def submit(self, work: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Run other small tasks on these threads, without the overhead of torch's intra-op threads."""
        return self._pool.submit(work, *arguments)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def crop_and_resize(
    planes: Tensor,
    start: Sequence[int],
    end: Sequence[int],
    *,
    mirror: bool,
    out: Tensor,
    vertical: bool = False,
    transpose: bool = False,
) -> None:
    """Resize the box ``start`` to ``end`` (y, x in pixels) of [1, channels, H, W] into ``out`` [channels, H, W]."""
    box = planes[:, :, start[0] : end[0], start[1] : end[1]]
    if box.dtype != torch.uint8:
        box = box.float()
    resized = interpolate(box, size=out.shape[1:], mode="bicubic", antialias=True)[0]
    if axes := [axis for axis, is_flipped in ((1, vertical), (2, mirror)) if is_flipped]:
        resized = resized.flip(axes)
    out.copy_(resized.transpose(1, 2) if transpose else resized)


def _disable_intra_op_threads() -> None:
    # the first query in a thread resets its count to the process's, even after a set, so query before setting
    torch.get_num_threads()
    torch.set_num_threads(1)


def _make_sample(
    image: Tensor, views: ViewParameters, row: int, groups: Sequence[_ViewGroup], augment: AugmentRow | None
) -> None:
    """Write all views of one image [H, W, channels] into ``out[:, row]`` of each group."""
    size = np.array(image.shape[:2])
    starts = np.rint(views.roi_start[row] * size).astype(int).tolist()
    ends = np.rint(views.roi_end[row] * size).astype(int).tolist()
    mirrored, vertical, transposed = (each[row].tolist() for each in (views.mirror, views.vertical, views.transpose))
    planes = image.permute(2, 0, 1)[None]
    for group in groups:
        count, batch_size, height, width, channels = group.out.shape
        # float32 where apply_appearance needs it
        is_recolored = group.appearance is not None and group.appearance.table is not None
        dtype = torch.float32 if is_recolored else group.out.dtype
        crops = torch.empty(count, channels, height, width, dtype=dtype)
        for view, out in enumerate(crops, group.first):
            turn = {"mirror": mirrored[view], "vertical": vertical[view], "transpose": transposed[view]}
            crop_and_resize(planes, starts[view], ends[view], out=out, **turn)
        if count:
            if group.appearance:
                crops = apply_appearance(crops, group.appearance.rows(slice(row, None, batch_size)))
                if augment is not None:
                    crops = augment(crops.contiguous(), row, group.first > 0)
            for channel in range(channels):
                group.out[:, row, ..., channel] = crops[:, channel]


def _color_table(color: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    brightness, contrast, saturation, hue = color.astype(np.float64).T
    angle = np.deg2rad(hue)
    chroma = np.zeros((len(color), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(angle)
    # increasing hue (red, yellow, green) rotates the I-Q plane clockwise
    chroma[:, 1, 2], chroma[:, 2, 1] = saturation * np.sin(angle), -saturation * np.sin(angle)
    matrix = (brightness * contrast)[:, None, None] * (_FROM_YIQ @ chroma @ _TO_YIQ)
    # crops without colour changes keep their values exactly
    matrix[(color == np.array([1, 1, 1, 0], np.float32)).all(1)] = np.eye(3)
    # contrast adds a share of the mean luma as grey; saturation and hue do not change grey
    grey = (brightness * (1 - contrast))[:, None] * _LUMA
    return np.concatenate([matrix.reshape(-1, 9), grey], 1).astype(np.float32)


def _blur_bands(sigma: npt.NDArray[np.float32], tile: int) -> npt.NDArray[np.float32]:
    offsets = np.arange(tile + 2 * BLUR_RADIUS)[:, None] - np.arange(tile) - BLUR_RADIUS
    # crops without blur get an unused band; sigma 1 avoids dividing by zero
    sigma = np.where(sigma > 0, sigma, 1.0)[:, None, None].astype(np.float64)
    band = np.exp(-0.5 * (offsets / sigma) ** 2) * (abs(offsets) <= BLUR_RADIUS)
    # smaller weights are invisible, and denormal numbers are slow
    band[band < 1e-6] = 0
    return (band / band.sum(1, keepdims=True)).astype(np.float32)


def _map_colors(planes: Tensor, table: Tensor) -> Tensor:
    """Map the colours of float32 [N, 3, H, W] in 0..255 and add 0.5, so that truncating the result rounds it."""
    pixels = planes.flatten(2)
    grey = (pixels.mean(2) * table[:, 9:]).sum(1) + 0.5
    result = torch.baddbmm(grey[:, None, None].expand(-1, 3, 1), table[:, :9].view(-1, 3, 3), pixels)
    return result.clamp_(0.5, 255.5).view(planes.shape)


def _blur(values: Tensor, bands: Tensor) -> Tensor:
    """Gaussian blur of float32 [n, channels, H, W] as matmuls of tiles with a band: fewer passes than shifts."""
    num, channels, inner_height, _ = values.shape
    reach, tile = bands.shape[1:]
    # planes padded to a whole number of tiles and stacked, so that all windows [reach, width] are evenly spaced views;
    # the few windows that straddle two planes are computed and ignored
    below = BLUR_RADIUS + -(inner_height + 2 * BLUR_RADIUS) % tile
    padded = pad(values, (BLUR_RADIUS, BLUR_RADIUS, BLUR_RADIUS, below), mode="reflect")
    height, width = padded.shape[2:]
    windows = padded.view(-1, width).unfold(0, reach, tile).transpose(1, 2)
    weights = bands.mT[:, None].expand(-1, channels * height // tile, -1, -1).reshape(-1, tile, reach)
    columns = values.new_empty(len(weights), tile, width)
    torch.bmm(weights[: len(windows)], windows, out=columns[: len(windows)])

    lines = columns.view(num, channels * height, width).unfold(2, reach, tile).transpose(1, 2)
    rows = torch.matmul(lines, bands[:, None]).view(num, -1, channels, height, tile)
    return rows[..., :inner_height, :].permute(0, 2, 3, 1, 4).reshape(values.shape)
