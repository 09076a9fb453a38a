"""The random part of multi-crop: boxes, flips and colours of every view, drawn in numpy from the slot alone.

Nothing here depends on which other samples share a batch, so a change of micro-batch, of ranks or a restart
repeats the same views. The law is that of DINO (Caron et al. 2021, arXiv:2104.14294; Oquab et al. 2023,
arXiv:2304.07193): random resized crop on the true pixel size, flip, colour jitter, grey, blur, solarize.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from shards.randomness import VIEWS, uniforms
from streamtrain.config.crops import CropsConfig

Floats = npt.NDArray[np.float64]

# attempts at a box that fits into the image before the clipped centre is taken
TRIES = 10
NO_SOLARIZE = 256
_AREA = slice(0, TRIES)
_ASPECT = slice(TRIES, 2 * TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST = range(2 * TRIES, 2 * TRIES + 6)
_SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(2 * TRIES + 6, 2 * TRIES + 12)
DRAWS_PER_VIEW = 2 * TRIES + 12


@dataclass(frozen=True)
class ViewParameters:
    """Everything random about the views of B samples; V views, the global ones first.

    Attributes:
        roi_start, roi_end: float32 [B, V, 2], corners (y, x) of the box relative to the image, in [0, 1].
        color: float32 [B, V, 4], factors of brightness, contrast and saturation, and the hue's turn in
            degrees; (1, 1, 1, 0) leaves the view alone, saturation 0 makes it grey.
        sigma: float32 [B, V], of the blur, in pixels of the view; 0 means none.
        solarize: int32 [B, V], values at or above it are inverted; 256 means none.
        mirror: int32 [B, V], 1 where the view is flipped left to right.
    """

    roi_start: npt.NDArray[np.float32]
    roi_end: npt.NDArray[np.float32]
    color: npt.NDArray[np.float32]
    sigma: npt.NDArray[np.float32]
    solarize: npt.NDArray[np.int32]
    mirror: npt.NDArray[np.int32]

    def rows(self, chosen: slice) -> ViewParameters:
        """The parameters of some of the samples."""
        return ViewParameters(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def draw_views(
    crops: CropsConfig, seed: int, slots: npt.NDArray[np.int64], sizes: npt.NDArray[np.int32]
) -> ViewParameters:
    """Draw the views of ``slots`` [B] whose images measure ``sizes`` [B, 2] (width, height) pixels."""
    num_views = crops.global_count + crops.local_count
    draws = uniforms(seed, VIEWS, slots, num_views * DRAWS_PER_VIEW)
    draws = draws.reshape(len(slots), num_views, DRAWS_PER_VIEW)
    roi_start, roi_end = _boxes(crops, draws, np.asarray(sizes, np.float64))
    jittered = draws[..., _JITTER] < crops.jitter.probability
    solarized = draws[..., _SOLARIZE] < per_view(crops, crops.solarize.global_probability, 0.0)
    blurred = draws[..., _BLUR] < per_view(crops, crops.blur.global_probability, crops.blur.local_probability)
    return ViewParameters(
        roi_start=roi_start,
        roi_end=roi_end,
        color=_colors(crops, draws, jittered),
        sigma=np.where(blurred, _between(crops.blur.sigma, draws[..., _SIGMA]), 0.0).astype(np.float32),
        solarize=np.where(solarized, crops.solarize.threshold, NO_SOLARIZE).astype(np.int32),
        mirror=(draws[..., _FLIP] < crops.flip).astype(np.int32),
    )


def per_view(crops: CropsConfig, global_values: tuple[float, ...], local_value: float) -> Floats:
    """One value a view [V]: the global ones in turn (the last repeats), then the local one."""
    last = len(global_values) - 1
    values = [global_values[min(view, last)] for view in range(crops.global_count)]
    return np.array(values + [local_value] * crops.local_count)


def _between(bounds: tuple[float, float], draw: Floats) -> Floats:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _boxes(
    crops: CropsConfig, draws: Floats, sizes: Floats
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Random resized crop: the first of ten boxes, in whole pixels, that fits; else the clipped centre."""
    width, height = sizes[:, 0, None, None], sizes[:, 1, None, None]
    low = per_view(crops, (crops.global_scale[0],), crops.local_scale[0])[:, None]
    high = per_view(crops, (crops.global_scale[1],), crops.local_scale[1])[:, None]
    side = np.sqrt((low + (high - low) * draws[..., _AREA]) * (width * height))
    log_low, log_high = np.log(crops.aspect)
    root = np.exp(0.5 * (log_low + (log_high - log_low) * draws[..., _ASPECT]))
    tried_width, tried_height = np.rint(side * root), np.rint(side / root)
    fits = (tried_width >= 1) & (tried_width <= width) & (tried_height >= 1) & (tried_height <= height)
    first = fits.argmax(-1)[..., None]
    found = fits.any(-1)

    width, height = width[..., 0], height[..., 0]
    centre_width = np.minimum(width, np.rint(height * crops.aspect[1]))
    centre_height = np.minimum(height, np.rint(width / crops.aspect[0]))
    box_width = np.where(found, np.take_along_axis(tried_width, first, -1)[..., 0], centre_width)
    box_height = np.where(found, np.take_along_axis(tried_height, first, -1)[..., 0], centre_height)
    top = np.where(found, np.floor(draws[..., _TOP] * (height - box_height + 1)), (height - box_height) // 2)
    left = np.where(found, np.floor(draws[..., _LEFT] * (width - box_width + 1)), (width - box_width) // 2)
    start = np.stack([top / height, left / width], -1)
    end = np.stack([(top + box_height) / height, (left + box_width) / width], -1)
    return start.astype(np.float32), end.astype(np.float32)


def _colors(crops: CropsConfig, draws: Floats, jittered: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    jitter = crops.jitter
    color = np.empty((*draws.shape[:2], 4), np.float32)
    for axis, (column, reach) in enumerate(
        ((_BRIGHTNESS, jitter.brightness), (_CONTRAST, jitter.contrast), (_SATURATION, jitter.saturation))
    ):
        color[..., axis] = np.where(jittered, _between((1.0 - reach, 1.0 + reach), draws[..., column]), 1.0)
    degrees = 360.0 * jitter.hue
    color[..., 3] = np.where(jittered, _between((-degrees, degrees), draws[..., _HUE]), 0.0)
    color[..., 2] *= draws[..., _GREY] >= crops.grey
    return color
