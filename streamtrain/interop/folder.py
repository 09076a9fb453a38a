"""The format of an export: its description, and writing its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor

from shards.format.files import read_json
from shards.format.pixels import PixelFormat
from streamtrain.config.model import ModelConfig
from streamtrain.config.section import Section
from streamtrain.data.batch import UNIT_RANGE
from streamtrain.errors import StreamtrainError
from streamtrain.interop.state_file import WEIGHTS_NAME
from streamtrain.model.vit import VisionTransformer

CONFIG_NAME = "config.json"
# settings of the run, next to the weights exported from it
RECIPE_NAME = "recipe.yaml"
_OWN_KEY, _OWN_FIELDS = "streamtrain", ("value_range", "mean", "std", "dtype", "image_size", "resize")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Deviation = Annotated[float, Field(gt=0)]
Byte = Annotated[int, Field(ge=0, le=255)]
Origin = dict[str, str | int | float | None]


class BackboneConfig(Section):
    """Description of a backbone: everything needed to use its weights.

    The shorter side of an image is resized to ``resize`` pixels, and the central square of ``image_size`` pixels is the
    input: by default the side of the global crops in training for both. Any multiple of the patch size works.
    Values of ``dtype`` from ``value_range`` become 0..1, then ``mean`` and ``std`` apply: each for all channels, or one
    per channel. ``background`` is the colour behind transparent images
    (None: their alpha channel is dropped). ``origin`` is the provenance of the weights.
    """

    model: ModelConfig
    image_size: int = Field(ge=1, le=1 << 14)
    resize: int = Field(ge=1, le=1 << 15)
    interpolation: Literal["bicubic"] = "bicubic"
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    value_range: tuple[tuple[float, float], ...] = Field(default=UNIT_RANGE, min_length=1)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[Deviation, ...] = IMAGENET_STD
    background: tuple[Byte, Byte, Byte] | None = (255, 255, 255)
    origin: Origin = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _resize_to_image_size_by_default(cls, values: Any) -> Any:
        """Add ``resize``, which earlier exports lack."""
        if isinstance(values, dict) and "resize" not in values and "image_size" in values:
            return {**values, "resize": values["image_size"]}
        return values

    @model_validator(mode="after")
    def _check_margin(self) -> BackboneConfig:
        if self.resize < self.image_size:
            raise ValueError(f"resize {self.resize} is smaller than the crop, image_size {self.image_size}")
        return self

    @model_validator(mode="after")
    def _check_channels(self) -> BackboneConfig:
        for name in ("value_range", "mean", "std"):
            if len(getattr(self, name)) not in (1, self.model.channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.model.channels} channels")
        if any(low >= high for low, high in self.value_range):
            raise ValueError("value_range must be ascending")
        return self

    @property
    def pixels(self) -> PixelFormat:
        """Channels and dtype of the images."""
        return PixelFormat(self.model.channels, self.dtype)

    @property
    def is_scaled_by_255(self) -> bool:
        """Whether the values are 8-bit and become 0..1 by a division by 255, as other libraries do it."""
        return self.dtype == "uint8" and self.value_range == UNIT_RANGE

    def moments(self, unit: float = 1.0) -> dict[str, list[float]]:
        """Return ``mean`` and ``std``, a number per channel, that normalise stored values divided by ``unit``."""
        means, deviations = [], []
        for n in range(self.model.channels):
            low, high = self.value_range[n % len(self.value_range)]
            mean, std = self.mean[n % len(self.mean)], self.std[n % len(self.std)]
            # without rounding where nothing changes
            is_same = (low, high) == (0, unit)
            means.append(mean if is_same else (low + mean * (high - low)) / unit)
            deviations.append(std if is_same else std * (high - low) / unit)
        return {"mean": means, "std": deviations}

    def resize_for(self, size: int) -> int:
        """Return the shorter side in pixels before a crop of ``size`` pixels, with the margin of the default crop."""
        return max(size, round(size * self.resize / self.image_size))


def own_preprocessing(config: BackboneConfig) -> dict[str, Any]:
    """Return an entry for a config of another library, with the fields that it cannot state."""
    return {_OWN_KEY: {name: getattr(config, name) for name in _OWN_FIELDS}}


def read_own_preprocessing(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``own_preprocessing`` in a config of another library; empty if it has none."""
    own = document.get(_OWN_KEY)
    return {name: own[name] for name in _OWN_FIELDS if name in own} if isinstance(own, dict) else {}


def read_document(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; raises StreamtrainError if it has none."""
    try:
        document = read_json(path)
    except (ValueError, OSError) as error:
        raise StreamtrainError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise StreamtrainError(f"{path} contains a {type(document).__name__}, not a mapping")
    return document


def read_mapping(document: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    """Return the mapping at ``key``, empty if there is none; raises StreamtrainError for another value."""
    value = document.get(key) or {}
    if not isinstance(value, dict):
        raise StreamtrainError(f"{source}: {key} is a {type(value).__name__}, not a mapping")
    return value


def parse_config(document: object, source: str) -> BackboneConfig:
    """Return a validated description; raises StreamtrainError with the first fault."""
    try:
        return BackboneConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        fault = f"{where}: {reason}" if where else reason
        raise StreamtrainError(f"{source} does not describe a streamtrain backbone: {fault}") from None


def export_safetensors(model: VisionTransformer, config: BackboneConfig, out: Path) -> None:
    """Write ``out``/model.safetensors, with the config in its header too, and ``out``/config.json."""
    text = config.model_dump_json(indent=1)
    # "format" is a convention of the Hugging Face ecosystem
    header = {"format": "pt", "streamtrain": json.dumps(json.loads(text))}
    write_folder(out, text, model.state_dict(), header)


def write_folder(out: Path, config_text: str, state: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write config.json and model.safetensors to a folder, which is created if it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_NAME).write_text(config_text + "\n", encoding="utf-8")
    save_file({name: value.contiguous() for name, value in state.items()}, out / WEIGHTS_NAME, metadata=header)


def check_one_norm(config: BackboneConfig, family: str) -> None:
    """Raise StreamtrainError if CLS and registers have their own final norm, which ``family`` does not support."""
    if config.model.cls_norm:
        raise StreamtrainError(
            f"{family}'s DINOv3 models have one final norm, but this one has another for CLS and registers "
            f"(model.untied_norms={config.model.untied_norms}); export it with --to safetensors"
        )
