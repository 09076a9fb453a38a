"""Colour, blur and solarize of crops, on the device they lie on: elementwise torch, the same on CPU and GPU.

The law is that of DINO's jitter, grey, blur and solarize in this order. What differs from the reference:
brightness, contrast (about the crop's mean luma, as there), saturation and hue (a turn of the chroma plane of YIQ,
not in HSV) are one linear map in this order, clipped once, where the reference draws their order and clips and rounds
after each; the only rounding here is the last. The blur is the reference's: separable, a window of 9, reflected edges.

On a CPU this is called once a sample, so that a sample's pixels do not depend on its batch to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from streamtrain.data.augment import NO_SOLARIZE

BLUR_RADIUS = 4
_LUMA = (0.299, 0.587, 0.114)
_TO_YIQ = np.array([_LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True)
class Appearance:
    """What ``adjust`` does to N crops, worked out for many at once.

    Attributes:
        table: float32 [N, 12], a 3 x 3 matrix of colours, then the share of the crop's mean red, green and blue that
            is added as grey.
        bands: float32 [N, reach, tile], how much each pixel of a tile takes of those within its reach.
        blurred: bool [N], whether the bands are to be used.
        solarize: int32 [N], as in ``ViewParameters``.
    """

    table: npt.NDArray[np.float32]
    bands: npt.NDArray[np.float32]
    blurred: npt.NDArray[np.bool_]
    solarize: npt.NDArray[np.int32]

    @classmethod
    def of(
        cls, color: npt.NDArray[np.float32], sigma: npt.NDArray[np.float32], solarize: npt.NDArray[np.int32], size: int
    ) -> Appearance:
        """That of crops of ``size`` x ``size`` with N of the parameters of ``ViewParameters``."""
        return cls(_color_table(color), _blur_bands(sigma, math.gcd(size, 16)), sigma > 0, solarize)

    def rows(self, chosen: slice) -> Appearance:
        """That of some of the crops."""
        return Appearance(self.table[chosen], self.bands[chosen], self.blurred[chosen], self.solarize[chosen])


def adjust(planes: Tensor, looks: Appearance) -> Tensor:
    """Apply colour, then blur, then solarize to crops [N, 3, S, S] of whole numbers from 0 to 255; the result is uint8.

    Does not wait for the device.
    """
    values = _recolor(planes.float(), _upload(looks.table, planes.device))
    if looks.blurred.all():
        values = _blur(values, _upload(looks.bands, planes.device))
    elif looks.blurred.any():
        rows = _upload(np.flatnonzero(looks.blurred), planes.device)
        bands = _upload(looks.bands[looks.blurred], planes.device)
        values.index_copy_(0, rows, _blur(values.index_select(0, rows), bands))
    # halves were added before, so cutting rounds; a CPU cuts to 16 bits and on to 8 in half the time of to 8 at once
    result = values.to(torch.int16).to(torch.uint8)
    inverted = np.flatnonzero(looks.solarize < NO_SOLARIZE)
    if len(inverted):
        rows = _upload(inverted, planes.device)
        chosen = result.index_select(0, rows)
        threshold = _upload(looks.solarize[inverted].astype(np.uint8), planes.device)[:, None, None, None]
        result.index_copy_(0, rows, torch.where(chosen >= threshold, 255 - chosen, chosen))
    return result


def _color_table(color: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    brightness, contrast, saturation, hue = color.astype(np.float64).T
    angle = np.deg2rad(hue)
    chroma = np.zeros((len(color), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(angle)
    # a rising hue (red, yellow, green) turns the plane of I and Q clockwise
    chroma[:, 1, 2], chroma[:, 2, 1] = saturation * np.sin(angle), -saturation * np.sin(angle)
    matrix = (brightness * contrast)[:, None, None] * (_FROM_YIQ @ chroma @ _TO_YIQ)
    # crops without colour changes keep their values to the bit
    matrix[(color == np.array([1, 1, 1, 0], np.float32)).all(1)] = np.eye(3)
    # contrast adds grey, a share of the mean luma, which saturation and hue leave alone
    grey = (brightness * (1 - contrast))[:, None] * _LUMA
    return np.concatenate([matrix.reshape(-1, 9), grey], 1).astype(np.float32)


def _blur_bands(sigma: npt.NDArray[np.float32], tile: int) -> npt.NDArray[np.float32]:
    offsets = np.arange(tile + 2 * BLUR_RADIUS)[:, None] - np.arange(tile) - BLUR_RADIUS
    # what is not blurred needs no band, but one free of division by zero
    sigma = np.where(sigma > 0, sigma, 1.0)[:, None, None].astype(np.float64)
    band = np.exp(-0.5 * (offsets / sigma) ** 2) * (abs(offsets) <= BLUR_RADIUS)
    # below this nothing shows, and processors are slow with the tiniest numbers
    band[band < 1e-6] = 0
    return (band / band.sum(1, keepdims=True)).astype(np.float32)


def _recolor(planes: Tensor, table: Tensor) -> Tensor:
    """Float32 [N, 3, S, S] in 0 to 255 to the same plus a half, so that what follows rounds by cutting."""
    pixels = planes.flatten(2)
    grey = (pixels.mean(2) * table[:, 9:]).sum(1) + 0.5
    result = torch.baddbmm(grey[:, None, None].expand(-1, 3, 1), table[:, :9].view(-1, 3, 3), pixels)
    return result.clamp_(0.5, 255.5).view(planes.shape)


def _blur(values: Tensor, bands: Tensor) -> Tensor:
    """Gaussian blur of float32 [n, 3, S, S], as products of tiles with a band: fewer passes than sums of shifts."""
    num, _, size, _ = values.shape
    reach, tile = bands.shape[1:]
    # planes of a whole number of tiles, one above the other, so that all windows [reach, width] are views, evenly
    # spaced; the few that straddle two planes go to waste
    below = BLUR_RADIUS + -(size + 2 * BLUR_RADIUS) % tile
    padded = pad(values, (BLUR_RADIUS, BLUR_RADIUS, BLUR_RADIUS, below), mode="reflect")
    height, width = padded.shape[2:]
    windows = padded.view(-1, width).unfold(0, reach, tile).transpose(1, 2)
    weights = bands.mT[:, None].expand(-1, 3 * height // tile, -1, -1).reshape(-1, tile, reach)
    columns = values.new_empty(len(weights), tile, width)
    torch.bmm(weights[: len(windows)], windows, out=columns[: len(windows)])

    lines = columns.view(num, 3 * height, width).unfold(2, reach, tile).transpose(1, 2)
    rows = torch.matmul(lines, bands[:, None]).view(num, -1, 3, height, tile)
    return rows[..., :size, :].permute(0, 2, 3, 1, 4).reshape(values.shape)


def _upload(array: npt.NDArray, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, so that nothing waits for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
