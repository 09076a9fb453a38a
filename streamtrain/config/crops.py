"""The ``crops`` section: multi-crop views and their augmentations (Oquab et al. 2023; Siméoni et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import model_validator

from streamtrain.config.section import NonNegative, Positive, Probability, Range, Section, accept, within

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
    global_size: Positive | None = accept(None, "Side of global crops in pixels; null: crops.global_size.")
    local_size: Positive | None = accept(None, "Side of local crops in pixels; null: crops.local_size.")
    gram_size: Positive | None = accept(None, "Side of the Gram teacher's crops in pixels; null: objective.gram.size.")


@dataclass(frozen=True)
class CropSizes:
    """Sides of the views of a step, in pixels; without ``gram_size`` the Gram teacher gets the global views."""

    global_size: int
    local_size: int
    gram_size: int | None = None


class CropsConfig(Section):
    """Views of an image. Sizes in pixels, scales as shares of the image's area."""

    global_count: Positive = accept(2, "Global views per image.")
    global_size: Positive = accept(224, "Side of global crops in pixels, a multiple of model.patch_size.")
    global_scale: Scale = accept((0.32, 1.0), "Range of a global crop's share of the image's area.")
    local_count: NonNegative = accept(8, "Local views per image.")
    local_size: Positive = accept(96, "Side of local crops in pixels, a multiple of model.patch_size.")
    local_scale: Scale = accept((0.05, 0.32), "Range of a local crop's share of the image's area.")
    sizes: tuple[SizesConfig, ...] = accept(
        (), "Sets of sizes that alternate from step to step, each with its share; empty: always the sizes above."
    )
    aspect: Annotated[Range, within("aspect", 0.05, 20.0)] = accept(
        (3 / 4, 4 / 3), "Range of a crop's width / height before it is resized to a square."
    )
    flip: Probability = accept(0.5, "Share of views that are flipped horizontally.")
    jitter: JitterConfig = JitterConfig()
    grey: Probability = accept(0.2, "Share of views that are converted to greyscale.")
    blur: BlurConfig = BlurConfig()
    solarize: SolarizeConfig = SolarizeConfig()
    mean: tuple[float, float, float] = accept(
        (0.485, 0.456, 0.406), "Mean of the red, green and blue values (0 to 1) that is subtracted."
    )
    std: tuple[float, float, float] = accept(
        (0.229, 0.224, 0.225), "Standard deviation of the red, green and blue values (0 to 1) to divide by."
    )

    @model_validator(mode="after")
    def _check_probabilities_and_std(self) -> CropsConfig:
        if not self.blur.global_probability or not self.solarize.global_probability:
            raise ValueError("blur and solarize need at least one probability for the global views")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {list(self.std)}")
        return self
