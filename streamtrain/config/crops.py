"""The ``crops`` section: multi-crop views and their augmentations (Oquab et al. 2023; Siméoni et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from shards.format.statistics import Moments
from streamtrain.config.section import (
    FOLLOWS,
    SET_STATISTICS,
    VALUE_TYPE,
    CropSize,
    ImageSize,
    NonNegative,
    Positive,
    Probability,
    Range,
    Section,
    accept,
    resolve,
    within,
)

FROM_SET = "from_set"
_PAIRS_TEXT = "must be ascending numbers [low, high], or a list of such pairs"


def _set_values(value: Any, info: ValidationInfo) -> Any:
    """Replace ``from_set`` by the statistics of the images, scaled by ``value_range``; return other values."""
    if not isinstance(value, str):
        return value
    if value != FROM_SET:
        raise ValueError(f"must be a list of numbers, or {FROM_SET}")
    statistics: Callable[[], Moments] | None = (info.context or {}).get(SET_STATISTICS)
    if statistics is None:
        raise ValueError(f"{FROM_SET} needs a set of images; give data.shards")
    ranges = info.data.get("value_range")
    if ranges is None:
        raise PydanticCustomError(FOLLOWS, "follows from invalid settings")
    found, is_std = resolve(statistics), info.field_name == "std"
    if is_std and 0 in found.std:
        channel = found.std.index(0)
        raise ValueError(f"channel {channel} has the same value in all images, so {FROM_SET} is 0; give numbers")
    pairs = [ranges[channel % len(ranges)] for channel in range(len(found.mean))]
    if is_std:
        return [std / (high - low) for std, (low, high) in zip(found.std, pairs, strict=True)]
    return [(mean - low) / (high - low) for mean, (low, high) in zip(found.mean, pairs, strict=True)]


def _as_pairs(value: Any) -> Any:
    """Return ``[low, high]`` as a list of one pair."""
    nested = [isinstance(item, list | tuple) for item in value] if isinstance(value, list | tuple) else [False]
    if all(nested):
        return value
    if any(nested) or len(nested) != 2:
        raise ValueError(_PAIRS_TEXT)
    return [value]


def _check_pairs(pairs: tuple[Range, ...]) -> tuple[Range, ...]:
    if not pairs or any(low >= high for low, high in pairs):
        raise ValueError(_PAIRS_TEXT)
    return pairs


_VALUES, _PAIRS = ({VALUE_TYPE: text} for text in ("numbers, or from_set", "[low, high], or a list of such pairs"))
ChannelValues = Annotated[
    tuple[float, ...], BeforeValidator(_set_values), Field(min_length=1, json_schema_extra=cast(Any, _VALUES))
]
ChannelRanges = Annotated[
    tuple[Range, ...], BeforeValidator(_as_pairs), AfterValidator(_check_pairs),
    Field(json_schema_extra=cast(Any, _PAIRS)),
]  # fmt: skip
Scale = Annotated[Range, within("a crop scale", 1e-4, 1.0)]


class JitterConfig(Section):
    """Colour jitter. Factors are drawn from ``[1 - x, 1 + x]``."""

    probability: Probability = accept(0.8, "Share of the views that are jittered.")
    brightness: Probability = accept(0.4, "Maximum relative change of the brightness.")
    contrast: Probability = accept(0.4, "Maximum relative change of the contrast.")
    saturation: Probability = accept(0.2, "Maximum relative change of the saturation.")
    hue: float = accept(0.1, "Maximum rotation of the hue, where 1 is a full circle.", ge=0.0, le=0.5)


class BlurConfig(Section):
    """Gaussian blur of global and local views."""

    sigma: Annotated[Range, within("sigma", 0.0, 100.0)] = accept(
        (0.1, 2.0), "Range of the standard deviation in pixels."
    )
    global_probability: tuple[Probability, ...] = accept(
        (1.0, 0.1), "Share of blurred views, one number per global view; the last number repeats."
    )
    local_probability: Probability = accept(0.5, "Share of blurred local views.")


class SolarizeConfig(Section):
    """Solarization: inverts bright values of global views."""

    global_probability: tuple[Probability, ...] = accept(
        (0.0, 0.2), "Share of solarized views, one number per global view; the last number repeats."
    )
    threshold: int = accept(128, "Smallest 8-bit value that is inverted.", ge=0, le=255)


class SizesConfig(Section):
    """One of several sets of crop sizes that alternate from step to step."""

    share: float = accept(..., "Share of the steps with these sizes, relative to the other shares.", gt=0.0)
    global_size: CropSize | None = accept(None, "Size of global crops in pixels; null: crops.global_size.")
    local_size: CropSize | None = accept(None, "Size of local crops in pixels; null: crops.local_size.")
    gram_size: CropSize | None = accept(None, "Size of the Gram teacher's crops in pixels; null: objective.gram.size.")


@dataclass(frozen=True)
class CropSizes:
    """Sizes of the views of a step; without ``gram_size`` the Gram teacher gets the global views."""

    global_size: ImageSize
    local_size: ImageSize
    gram_size: ImageSize | None = None

    @classmethod
    def of(cls, global_size: Any, local_size: Any, gram_size: Any = None) -> CropSizes:
        """Return the sizes given as in the settings."""
        return cls(ImageSize.of(global_size), ImageSize.of(local_size), gram_size and ImageSize.of(gram_size))


class CropsConfig(Section):
    """Views of an image. Sizes in pixels, scales as shares of the image's area."""

    global_count: Positive = accept(2, "Global views per image.")
    global_size: CropSize = accept(224, "Size of global crops in pixels: multiples of model.patch_size.")
    global_scale: Scale = accept((0.32, 1.0), "Range of a global crop's share of the image's area.")
    window: Positive | None = accept(
        None, "Side of a window in pixels. All views of a larger image come from one random window of it. In a TIFF in "
        "tiles or strips, only the window is read and decoded. null: views come from the whole image.",
    )  # fmt: skip
    local_count: NonNegative = accept(8, "Local views per image.")
    local_size: CropSize = accept(96, "Size of local crops in pixels: multiples of model.patch_size.")
    local_scale: Scale = accept((0.05, 0.32), "Range of a local crop's share of the image's area.")
    sizes: tuple[SizesConfig, ...] = accept(
        (), "Sets of sizes that alternate from step to step, each with its share; empty: always the sizes above."
    )
    aspect: Annotated[Range, within("aspect", 0.05, 20.0)] = accept(
        (3 / 4, 4 / 3), "Range of a box's aspect ratio (width / height), relative to the aspect ratio of its crop."
    )
    flip: Probability = accept(0.5, "Share of views that are flipped horizontally.")
    flip_vertical: Probability = accept(0.0, "Share of views that are flipped vertically.")
    rotate90: Probability = accept(0.0, "Share of views that are turned by 90, 180 or 270 degrees; needs square crops.")
    jitter: JitterConfig = JitterConfig()
    grey: Probability = accept(0.2, "Share of views that are converted to greyscale.")
    blur: BlurConfig = BlurConfig()
    solarize: SolarizeConfig = SolarizeConfig()
    brightness: Probability = accept(
        0.0, "Maximum relative change of the brightness of a view, for images of any channels: a factor from "
        "[1 - x, 1 + x] of all values, counted from the lower end of value_range.",
    )  # fmt: skip
    contrast: Probability = accept(
        0.0, "Maximum relative change of the contrast of a view, for images of any channels: about the mean of each "
        "channel of the view, by the same factor in all channels.",
    )  # fmt: skip
    noise: float = accept(
        0.0, "Standard deviation of Gaussian noise in every value of a view after normalisation, for images of any "
        "channels.", ge=0.0, le=10.0,
    )  # fmt: skip
    channel_dropout: float = accept(
        0.0, "Probability that a channel of a view is dropped, that is, set to its mean; at least one channel remains.",
        ge=0.0, lt=1.0,
    )  # fmt: skip
    value_range: ChannelRanges = accept(
        ((0.0, 255.0),), "Stored values that become 0 and 1: [low, high], or one such pair per channel. The default is "
        "[0, 65535] with data.dtype uint16, and [0, 1] with float32.",
    )  # fmt: skip
    mean: ChannelValues = accept(
        (0.485, 0.456, 0.406), "Mean to subtract after value_range: one number per channel, or one for all. from_set: "
        "the statistics of data.shards (streamtrain stats); several sets are averaged by their weights.",
    )  # fmt: skip
    std: ChannelValues = accept(
        (0.229, 0.224, 0.225), "Standard deviation to divide by after value_range: one number per channel, or one for "
        "all. from_set: as for mean.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_probabilities_and_std(self) -> CropsConfig:
        if not self.blur.global_probability or not self.solarize.global_probability:
            raise ValueError("blur and solarize need at least one probability for the global views")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {list(self.std)}")
        return self

    @property
    def is_perturbed(self) -> bool:
        """Whether views have the augmentations for any channels."""
        return max(self.brightness, self.contrast, self.noise, self.channel_dropout) > 0

    @property
    def rgb_only(self) -> dict[str, str]:
        """The values that disable the augmentations in use that only RGB images have, by key."""
        used = {
            "crops.jitter.probability": ("0", self.jitter.probability > 0),
            "crops.grey": ("0", self.grey > 0),
            "crops.solarize.global_probability": ("[0]", max(self.solarize.global_probability) > 0),
        }
        return {key: value for key, (value, is_used) in used.items() if is_used}
