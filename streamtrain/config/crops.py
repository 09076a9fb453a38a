"""Multi-crop: sizes, scales and colours of the views (Oquab et al. 2023; Siméoni et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, field_validator, model_validator

from streamtrain.config.section import NonNegative, Positive, Probability, Range, Section, check_range


class JitterConfig(Section):
    """Colour jitter: factors within ``1 ± x``; hue within ``± hue`` turns (1 turn = 360°)."""

    probability: Probability = 0.8
    brightness: Probability = 0.4
    contrast: Probability = 0.4
    saturation: Probability = 0.2
    hue: float = Field(default=0.1, ge=0.0, le=0.5)


class BlurConfig(Section):
    """Gaussian blur: ``sigma`` in pixels, one probability a global view (the last repeats)."""

    sigma: Range = (0.1, 2.0)
    global_probability: tuple[Probability, ...] = (1.0, 0.1)
    local_probability: Probability = 0.5

    @field_validator("sigma")
    @classmethod
    def _ascending(cls, value: Range) -> Range:
        return check_range("sigma", value, 0.0, 100.0)


class SolarizeConfig(Section):
    """Inversion of all values at or above ``threshold`` on global views (the last probability repeats)."""

    global_probability: tuple[Probability, ...] = (0.0, 0.2)
    threshold: int = Field(default=128, ge=0, le=255)


class SizesConfig(Section):
    """One of several sets of sizes in pixels; null: that of the ``crops`` section (or of ``objective.gram``)."""

    # of the steps, relative to the shares of the other sets
    share: float = Field(gt=0.0)
    global_size: Positive | None = None
    local_size: Positive | None = None
    gram_size: Positive | None = None


@dataclass(frozen=True)
class CropSizes:
    """Sides in pixels of the views of a step; ``gram_size`` None: the Gram teacher sees the global views."""

    global_size: int
    local_size: int
    gram_size: int | None = None


class CropsConfig(Section):
    """``crops``: all of it affects results. Sizes in pixels, scales in shares of the image's area."""

    global_count: Positive = 2
    global_size: Positive = 224
    global_scale: Range = (0.32, 1.0)
    local_count: NonNegative = 8
    local_size: Positive = 96
    local_scale: Range = (0.05, 0.32)
    # sizes that alternate from step to step, each in its share of them; empty: always those above
    sizes: tuple[SizesConfig, ...] = ()
    aspect: Range = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    jitter: JitterConfig = JitterConfig()
    grey: Probability = 0.2
    blur: BlurConfig = BlurConfig()
    solarize: SolarizeConfig = SolarizeConfig()
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @field_validator("global_scale", "local_scale")
    @classmethod
    def _scale(cls, value: Range) -> Range:
        return check_range("a crop scale", value, 1e-4, 1.0)

    @field_validator("aspect")
    @classmethod
    def _aspect(cls, value: Range) -> Range:
        return check_range("aspect", value, 0.05, 20.0)

    @model_validator(mode="after")
    def _not_empty(self) -> CropsConfig:
        if not self.blur.global_probability or not self.solarize.global_probability:
            raise ValueError("blur and solarize need at least one probability for the global views")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {list(self.std)}")
        return self
