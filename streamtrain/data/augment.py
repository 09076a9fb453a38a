"""The random parameters of multi-crop: crop size, box, flip and colours of every view, drawn in numpy from the slot.

The parameters of a sample do not depend on the rest of its batch, so changing the micro-batch or the number of ranks,
or restarting, repeats the same views. The distribution is DINO's (Caron et al. 2021, arXiv:2104.14294; Oquab et al.
2023, arXiv:2304.07193): random resized crop on the true pixel size, flip, colour jitter, grey, blur, solarize.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from shards.randomness import PERTURBATIONS, SIZES, TURNS, VIEWS, generator, uniforms
from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.config.tree import Config

Floats = npt.NDArray[np.float64]

# boxes tried before falling back to the clipped centre of the image
TRIES = 10
NO_SOLARIZE = 256
_AREA = slice(0, TRIES)
_ASPECT = slice(TRIES, 2 * TRIES)
_TOP, _LEFT, _FLIP, _JITTER, _BRIGHTNESS, _CONTRAST = range(2 * TRIES, 2 * TRIES + 6)
_SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(2 * TRIES + 6, 2 * TRIES + 12)
DRAWS_PER_VIEW = 2 * TRIES + 12
# multiples of the golden ratio, modulo 1, are spread over [0, 1) more evenly than those of any other number
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class ViewParameters:
    """The random parameters of the V views of B samples; global views come first.

    Attributes:
        roi_start, roi_end: float32 [B, V, 2], corners (y, x) of the crop box relative to the image, in [0, 1].
        color: float32 [B, V, 4], factors of brightness, contrast and saturation, and the hue rotation in degrees;
            (1, 1, 1, 0) leaves the view unchanged, saturation 0 makes it grey.
        sigma: float32 [B, V], standard deviation of the blur in pixels of the view; 0 means no blur.
        solarize: int32 [B, V], threshold at and above which values are inverted; 256 means no inversion.
        mirror, vertical: int32 [B, V], 1 where the view is flipped left to right, and top to bottom.
        transpose: int32 [B, V], 1 where rows and columns are then exchanged. With flips, this gives quarter turns.
        factors: float32 [B, V, 2], of brightness and contrast, applied to images of any channels; 1 changes nothing.
        noise_keys: int64 [B, V], keys of the noise.
        dropped: bool [B, V, channels], where a channel is dropped.
    """

    roi_start: npt.NDArray[np.float32]
    roi_end: npt.NDArray[np.float32]
    color: npt.NDArray[np.float32]
    sigma: npt.NDArray[np.float32]
    solarize: npt.NDArray[np.int32]
    mirror: npt.NDArray[np.int32]
    vertical: npt.NDArray[np.int32]
    transpose: npt.NDArray[np.int32]
    factors: npt.NDArray[np.float32]
    noise_keys: npt.NDArray[np.int64]
    dropped: npt.NDArray[np.bool_]

    def rows(self, selection: slice) -> ViewParameters:
        return ViewParameters(**{field.name: getattr(self, field.name)[selection] for field in fields(self)})

    def shift(
        self, row: int, corner: tuple[int, int], window: npt.NDArray[np.int32], image: npt.NDArray[np.int32]
    ) -> None:
        """Make the crop boxes of a sample, drawn for a window, relative to its whole image, in place.

        Args:
            corner: first pixel (y, x) of the window in the image.
            window, image: their sizes int32 [2] (width, height).
        """
        for corners in (self.roi_start, self.roi_end):
            corners[row] = (np.rint(corners[row] * window[::-1]) + corner) / image[::-1]


def draw_views(
    crops: CropsConfig,
    seed: int,
    slots: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int32],
    channels: int = 3,
    crop_sizes: CropSizes | None = None,
) -> ViewParameters:
    """Draw the views of ``slots`` [B] whose images measure ``sizes`` [B, 2] (width, height) pixels.

    ``crop_sizes``: of the step; None: those of ``crops``.
    """
    target = crop_sizes or CropSizes(crops.global_size, crops.local_size)
    num_views = crops.global_count + crops.local_count
    draws = uniforms(seed, VIEWS, slots, num_views * DRAWS_PER_VIEW)
    draws = draws.reshape(len(slots), num_views, DRAWS_PER_VIEW)
    roi_start, roi_end = _draw_boxes(crops, draws, np.asarray(sizes, np.float64), target)
    is_jittered = draws[..., _JITTER] < crops.jitter.probability
    is_solarized = draws[..., _SOLARIZE] < expand_to_views(crops, crops.solarize.global_probability, 0.0)
    is_blurred = draws[..., _BLUR] < expand_to_views(crops, crops.blur.global_probability, crops.blur.local_probability)
    vertical, turns = _draw_turns(crops, seed, slots, num_views)
    factors, noise_keys, dropped = _draw_perturbations(crops, seed, slots, num_views, channels)
    return ViewParameters(
        roi_start=roi_start,
        roi_end=roi_end,
        color=_draw_colors(crops, draws, is_jittered),
        sigma=np.where(is_blurred, _scale_to(crops.blur.sigma, draws[..., _SIGMA]), 0.0).astype(np.float32),
        solarize=np.where(is_solarized, crops.solarize.threshold, NO_SOLARIZE).astype(np.int32),
        # a quarter turn to the left is a flip left to right, then the exchange of rows and columns
        mirror=((draws[..., _FLIP] < crops.flip) ^ ((turns == 1) | (turns == 2))).astype(np.int32),
        vertical=(vertical ^ (turns >= 2)).astype(np.int32),
        transpose=turns % 2,
        factors=factors,
        noise_keys=noise_keys,
        dropped=dropped,
    )


def _draw_turns(
    crops: CropsConfig, seed: int, slots: npt.NDArray[np.int64], num_views: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
    """Return which views [B, V] are flipped top to bottom, and by how many quarter turns to the left they are turned.

    These draws have a stream of their own, so that the other draws do not depend on them.
    """
    if not crops.flip_vertical and not crops.rotate90:
        return np.zeros((len(slots), num_views), bool), np.zeros((len(slots), num_views), np.int32)
    flips, turns = np.moveaxis(uniforms(seed, TURNS, slots, 2 * num_views).reshape(len(slots), num_views, 2), -1, 0)
    quarters = 1 + np.floor(3 * turns / max(crops.rotate90, 1e-9)).clip(0, 2)
    return flips < crops.flip_vertical, np.where(turns < crops.rotate90, quarters, 0).astype(np.int32)


def _draw_perturbations(
    crops: CropsConfig, seed: int, slots: npt.NDArray[np.int64], num_views: int, channels: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return factors, keys of the noise and dropped channels of ``ViewParameters``, from a stream of their own."""
    shape = len(slots), num_views
    if not crops.is_perturbed:
        return np.ones((*shape, 2), np.float32), np.zeros(shape, np.int64), np.zeros((*shape, channels), bool)
    draws = uniforms(seed, PERTURBATIONS, slots, num_views * (3 + channels)).reshape(*shape, 3 + channels)
    factors = 1 + np.array([crops.brightness, crops.contrast]) * (2 * draws[..., :2] - 1)
    by_channel = draws[..., 3:]
    # at least the channel of the largest draw remains
    dropped = (by_channel < crops.channel_dropout) & (by_channel < by_channel.max(-1, keepdims=True))
    return factors.astype(np.float32), (draws[..., 2] * 2.0**53).astype(np.int64), dropped


def expand_to_views(crops: CropsConfig, global_values: tuple[float, ...], local_value: float) -> Floats:
    """Return one value per view [V]: the global values in order (the last one repeats), then the local value."""
    last = len(global_values) - 1
    values = [global_values[min(view, last)] for view in range(crops.global_count)]
    return np.array(values + [local_value] * crops.local_count)


class SizeSchedule:
    """The crop sizes of every step, computed from the slot alone: equal on all ranks and in all micro-batches."""

    def __init__(self, config: Config, global_batch: int, start_slot: int) -> None:
        """``start_slot`` is the first slot of any step; steps are ``global_batch`` slots apart."""
        self._sizes = config.crop_sizes
        self._global_batch, self._offset = global_batch, start_slot % global_batch
        shares = [entry.share for entry in config.crops.sizes]
        self._bounds = [bound / sum(shares) for bound in accumulate(shares)]
        self._phase = float(generator(config.run.seed, SIZES).random())

    def sizes_at(self, slot: int) -> CropSizes:
        """Return the crop sizes of the step that contains ``slot``."""
        if len(self._sizes) == 1:
            return self._sizes[0]
        phase = (self._phase + (slot - self._offset) // self._global_batch * _GOLDEN) % 1.0
        # rounding may leave the last bound slightly below 1
        index = sum(phase >= bound for bound in self._bounds[:-1])
        return self._sizes[index]


def _scale_to(bounds: tuple[float, float], draw: Floats) -> Floats:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _draw_boxes(
    crops: CropsConfig, draws: Floats, sizes: Floats, target: CropSizes
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Random resized crop: return the first of ``TRIES`` boxes that fits, in whole pixels, or the clipped centre.

    The width / height of a box is the width / height of its crop in ``target`` times a factor from ``crops.aspect``.
    """
    width, height = sizes[:, 0, None, None], sizes[:, 1, None, None]
    low = expand_to_views(crops, (crops.global_scale[0],), crops.local_scale[0])[:, None]
    high = expand_to_views(crops, (crops.global_scale[1],), crops.local_scale[1])[:, None]
    side = np.sqrt((low + (high - low) * draws[..., _AREA]) * (width * height))
    log_low, log_high = np.log(crops.aspect)
    shape = expand_to_views(crops, (target.global_size.aspect,), target.local_size.aspect)
    root = np.exp(0.5 * (log_low + (log_high - log_low) * draws[..., _ASPECT])) * np.sqrt(shape)[:, None]
    tried_width, tried_height = np.rint(side * root), np.rint(side / root)
    fits = (tried_width >= 1) & (tried_width <= width) & (tried_height >= 1) & (tried_height <= height)
    first = fits.argmax(-1)[..., None]
    any_fits = fits.any(-1)

    width, height = width[..., 0], height[..., 0]
    centre_width = np.minimum(width, np.rint(height * (crops.aspect[1] * shape)))
    centre_height = np.minimum(height, np.rint(width / (crops.aspect[0] * shape)))
    box_width = np.where(any_fits, np.take_along_axis(tried_width, first, -1)[..., 0], centre_width)
    box_height = np.where(any_fits, np.take_along_axis(tried_height, first, -1)[..., 0], centre_height)
    top = np.where(any_fits, np.floor(draws[..., _TOP] * (height - box_height + 1)), (height - box_height) // 2)
    left = np.where(any_fits, np.floor(draws[..., _LEFT] * (width - box_width + 1)), (width - box_width) // 2)
    start = np.stack([top / height, left / width], -1)
    end = np.stack([(top + box_height) / height, (left + box_width) / width], -1)
    return start.astype(np.float32), end.astype(np.float32)


def _draw_colors(crops: CropsConfig, draws: Floats, is_jittered: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    jitter = crops.jitter
    color = np.empty((*draws.shape[:2], 4), np.float32)
    for axis, (column, reach) in enumerate(
        ((_BRIGHTNESS, jitter.brightness), (_CONTRAST, jitter.contrast), (_SATURATION, jitter.saturation))
    ):
        color[..., axis] = np.where(is_jittered, _scale_to((1.0 - reach, 1.0 + reach), draws[..., column]), 1.0)
    degrees = 360.0 * jitter.hue
    color[..., 3] = np.where(is_jittered, _scale_to((-degrees, degrees), draws[..., _HUE]), 0.0)
    color[..., 2] *= draws[..., _GREY] >= crops.grey
    return color
