"""Change the values of crops of any channels: brightness, contrast, noise and dropped channels, in this order.

Brightness and contrast are factors of the whole view: ``low + brightness * (x - low)``, where ``low`` is the lower end
of ``crops.value_range``, and ``mean + contrast * (x - mean)``, about each channel's own mean in the crop. Noise
is independent in every value. Dropped channels get their mean, so that they are 0 after normalisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from streamtrain.config.crops import CropsConfig
from streamtrain.data.augment import ViewParameters

Floats = npt.NDArray[np.float32]

# crops at a time; the draws of the noise take eight bytes a value
CROPS = 4
# of splitmix64, as signed numbers
_STEP, _FACTORS = 0x9E3779B97F4A7C15 - (1 << 64), (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


@dataclass(frozen=True)
class Perturbation:
    """Changes of N crops in stored units: ``gain * x + pull * mean + shift + noise * draws``, unless dropped.

    Attributes:
        gain, pull: float32 [N]; ``mean`` is the mean of the channel in the crop.
        shift: float32 [N, channels].
        noise, fill: float32 [N, channels], standard deviation of the noise, and the values of dropped channels.
        keys: int64 [N], of the noise.
        dropped: bool [N, channels].
    """

    gain: Floats
    pull: Floats
    shift: Floats
    noise: Floats
    fill: Floats
    keys: npt.NDArray[np.int64]
    dropped: npt.NDArray[np.bool_]

    @classmethod
    def from_views(cls, crops: CropsConfig, views: ViewParameters, first: int, count: int) -> Perturbation:
        """Return the changes of ``count`` views from view ``first`` on, in view-major order."""
        selection = slice(first, first + count)
        brightness, contrast = views.factors[:, selection].swapaxes(0, 1).reshape(-1, 2).T
        keys = views.noise_keys[:, selection].T.reshape(-1)
        dropped = views.dropped[:, selection].swapaxes(0, 1)
        dropped = dropped.reshape(-1, dropped.shape[-1])
        shape = dropped.shape
        low, high = np.array(crops.value_range).T
        width = high - low
        noise, fill = crops.noise * np.array(crops.std) * width, low + np.array(crops.mean) * width
        values = {
            "gain": brightness * contrast,
            "pull": brightness * (1 - contrast),
            "shift": (1 - brightness)[:, None] * np.broadcast_to(low, shape),
            "noise": np.broadcast_to(noise, shape),
            "fill": np.broadcast_to(fill, shape),
        }
        return cls(**{name: each.astype(np.float32) for name, each in values.items()}, keys=keys, dropped=dropped)

    def rows(self, selection: slice) -> Perturbation:
        return Perturbation(**{field.name: getattr(self, field.name)[selection] for field in fields(self)})


def perturb(planes: Tensor, perturbation: Perturbation) -> None:
    """Change crops [N, channels, H, W], uint8 or float32, in place; uint8 is rounded and clipped. No host sync."""
    gain, pull, shift, noise, fill, keys, dropped = (
        upload(np.ascontiguousarray(getattr(perturbation, field.name)), planes.device) for field in fields(perturbation)
    )
    for first in range(0, len(planes), CROPS):
        part = slice(first, first + CROPS)
        values = planes[part].float()
        mean = values.mean((2, 3), keepdim=True)
        offset = mean.mul_(pull[part, None, None, None]).add_(shift[part, :, None, None])
        values = torch.addcmul(offset, values, gain[part, None, None, None])
        if perturbation.noise.any():
            values.addcmul_(draw_normal(keys[part], values[0].numel()).view_as(values), noise[part, :, None, None])
        values = torch.where(dropped[part, :, None, None], fill[part, :, None, None], values)
        planes[part] = values if planes.is_floating_point() else values.round_().clamp_(0, 255)


def draw_normal(keys: Tensor, count: int) -> Tensor:
    """Return standard normal draws, float32 [N, count]; row i only depends on ``keys[i]``, int64 [N].

    Integer arithmetic makes the bits equal on every device, unlike torch's generators.
    """
    bits = keys[:, None] + torch.arange(1, count + 1, device=keys.device) * _STEP
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        bits = _mix(bits, shift).mul_(factor)
    bits = _mix(bits, 31)
    radius = (bits >> 40).bitwise_and_(0xFFFFFF).float().add_(1).mul_(2**-24).log_().mul_(-2).sqrt_()
    angle = (bits >> 16).bitwise_and_(0xFFFFFF).float().mul_(2**-24 * 2 * math.pi)
    return angle.cos_().mul_(radius)


def _mix(bits: Tensor, shift: int) -> Tensor:
    # the mask removes the copies of the sign, because >> of int64 is arithmetic
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1).bitwise_xor_(bits)


def upload(array: npt.NDArray, device: torch.device) -> Tensor:
    """Copy to the device, from pinned memory so that the copy is asynchronous."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
