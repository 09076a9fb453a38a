"""Colour, blur and solarize of crops, on the device they lie on: elementwise torch, the same on CPU and GPU.

The law is that of DINO's jitter, grey, blur and solarize in this order. What differs from the reference:
brightness, contrast (about the crop's mean luma, as there), saturation and hue (a turn of the chroma plane of YIQ,
not in HSV) are one linear map in this order, clipped and rounded once, where the reference draws their order and
clips after each. The blur is the reference's: separable, a window of 9, reflected edges.

On a CPU this is called once a sample, so that a sample's pixels do not depend on its batch to the last bit.
"""

from __future__ import annotations

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


def adjust(
    planes: Tensor, color: npt.NDArray[np.float32], sigma: npt.NDArray[np.float32], solarize: npt.NDArray[np.int32]
) -> Tensor:
    """Apply colour, then blur, then solarize to crops uint8 [N, 3, S, S]; the result is of the same kind.

    ``color`` [N, 4], ``sigma`` [N] and ``solarize`` [N] are as in ``ViewParameters``. Does not wait for the device.
    """
    values = _recolor(planes, color)
    blurred = np.flatnonzero(sigma)
    if len(blurred):
        rows = _upload(blurred, planes.device)
        values.index_copy_(0, rows, _blur(values.index_select(0, rows), sigma[blurred]))
    inverted = np.flatnonzero(solarize < NO_SOLARIZE)
    if len(inverted):
        rows = _upload(inverted, planes.device)
        chosen = values.index_select(0, rows)
        threshold = _upload(solarize[inverted].astype(np.float32), planes.device)[:, None, None, None]
        values.index_copy_(0, rows, torch.where(chosen >= threshold, 255 - chosen, chosen))
    return values.to(torch.uint8)


def _recolor(planes: Tensor, color: npt.NDArray[np.float32]) -> Tensor:
    """uint8 [N, 3, S, S] to float32 in whole numbers from 0 to 255."""
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
    table = np.concatenate([matrix.reshape(-1, 9), (brightness * (1 - contrast))[:, None]], 1).astype(np.float32)
    factors = _upload(table, planes.device)

    pixels = planes.shape[2] * planes.shape[3]
    sums = planes.flatten(2).sum(2, dtype=torch.int32).float()
    luma = (sums[:, 0] * _LUMA[0] + sums[:, 1] * _LUMA[1] + sums[:, 2] * _LUMA[2]) / pixels
    # what contrast adds is grey, which saturation and hue leave alone
    grey = (factors[:, 9] * luma)[:, None, None].expand(-1, 3, 1)
    result = torch.baddbmm(grey, factors[:, :9].view(-1, 3, 3), planes.flatten(2).float())
    return result.round_().clamp_(0, 255).view(planes.shape)


def _blur(values: Tensor, sigma: npt.NDArray[np.float32]) -> Tensor:
    """Gaussian blur of float32 [n, 3, S, S], rounded."""
    offsets = np.arange(BLUR_RADIUS + 1)
    kernel = np.exp(-0.5 * (offsets / sigma[:, None].astype(np.float64)) ** 2)
    kernel /= 2 * kernel.sum(1, keepdims=True) - kernel[:, :1]
    weights = _upload(kernel.astype(np.float32), values.device)[..., None, None, None]
    # one buffer for all sums: fresh memory costs a CPU more than the arithmetic
    both = torch.empty_like(values)
    for axis in (3, 2):
        size = values.shape[axis]
        edge = (BLUR_RADIUS, BLUR_RADIUS)
        padded = pad(values, (*edge, 0, 0) if axis == 3 else (0, 0, *edge), mode="reflect")
        torch.mul(padded.narrow(axis, BLUR_RADIUS, size), weights[:, 0], out=values)
        for offset in range(1, BLUR_RADIUS + 1):
            before = padded.narrow(axis, BLUR_RADIUS - offset, size)
            torch.add(before, padded.narrow(axis, BLUR_RADIUS + offset, size), out=both)
            values.addcmul_(both, weights[:, offset])
    return values.round_()


def _upload(array: npt.NDArray, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, so that nothing waits for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
