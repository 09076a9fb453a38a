"""The whole configuration: all sections, and checks across sections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, model_validator
from pydantic.fields import FieldInfo

from shards.format.imagery import MAX_DECODED_BYTES
from shards.format.pixels import MAX_CHANNELS, RGB, VALUE_RANGES
from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.config.data import DataConfig
from streamtrain.config.engine import EngineConfig, OptimConfig, TeacherConfig
from streamtrain.config.evaluation import EvaluationConfig
from streamtrain.config.feature_teacher import find_teacher_fault
from streamtrain.config.init import InitConfig
from streamtrain.config.masks import MasksConfig
from streamtrain.config.model import ModelConfig
from streamtrain.config.monitor import MonitorConfig
from streamtrain.config.objective import ObjectiveConfig
from streamtrain.config.pixels import find_pixel_fault
from streamtrain.config.run import RunConfig
from streamtrain.config.schedules import Schedule, SchedulesConfig
from streamtrain.config.section import RESUME_RULE, ImageSize, ResumeRule, Section, is_path
from streamtrain.errors import ConfigError

# most crops that the loader keeps ready on a GPU
AHEAD_BYTES = 512 * 2**20


class Config(Section):
    """All settings of a run; the resolved form is saved as ``config.yaml`` in the run directory."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    crops: CropsConfig = CropsConfig()
    masks: MasksConfig = MasksConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    schedules: SchedulesConfig = SchedulesConfig()
    engine: EngineConfig = EngineConfig()
    monitor: MonitorConfig = MonitorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    init: InitConfig = InitConfig()

    @model_validator(mode="before")
    @classmethod
    def _follow_pixels(cls, sections: Any) -> Any:
        """Fill in ``model.channels`` and ``crops.value_range``, whose defaults follow the images."""
        if not isinstance(sections, dict) or (data := sections.get("data")) is None:
            return sections
        channels, dtype = (_value(data, name) for name in ("channels", "dtype"))
        filled = dict(sections)
        if type(channels) is int and channels != RGB.channels and 1 <= channels <= MAX_CHANNELS:
            filled["model"] = _with_default(sections.get("model"), "channels", channels)
        if dtype in VALUE_RANGES and dtype != RGB.dtype:
            filled["crops"] = _with_default(sections.get("crops"), "value_range", (VALUE_RANGES[dtype],))
        return filled

    @model_validator(mode="after")
    def _check_pixels(self) -> Config:
        if fault := find_pixel_fault(self):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Config:
        patch = self.model.patch_size
        sizes: dict[str, ImageSize | None] = {"objective.gram.size": self.objective.gram.size}
        sizes |= {f"crops.{name}": getattr(self.crops, name) for name in ("global_size", "local_size")}
        for index, entry in enumerate(self.crops.sizes):
            for name in ("global_size", "local_size", "gram_size"):
                sizes[f"crops.sizes.{index}.{name}"] = getattr(entry, name)
            if entry.gram_size and not self.objective.gram.is_active:
                raise ValueError(f"crops.sizes.{index}.gram_size has an effect only with objective.gram.weight above 0")
        for name, size in sizes.items():
            if size and not size.fits(patch):
                raise ValueError(f"{name} {size} is not a multiple of model.patch_size {patch}")
        self._check_window()
        for one in self.crop_sizes:
            gram, full = one.gram_size, one.global_size
            if gram and gram.height * full.width != gram.width * full.height:
                raise ValueError(
                    f"objective.gram.size or gram_size {gram} does not have the proportions of the global crops, "
                    f"{full}; choose a multiple of crops.global_size"
                )
            if self.crops.rotate90 and not (full.is_square and one.local_size.is_square):
                raise ValueError(
                    "crops.rotate90 needs square crops, because a quarter turn exchanges height and width; set it to 0 "
                    "(crops.flip and crops.flip_vertical remain), or make crops.global_size and local_size square"
                )
        if len({entry.gram_size is None for entry in self.crops.sizes}) > 1 and not self.objective.gram.size:
            raise ValueError("crops.sizes: give gram_size in every entry or in none, or objective.gram.size")
        return self

    def _check_window(self) -> None:
        """Raise a ValueError if windows are smaller than every crop, or too large to be decoded."""
        if (side := self.crops.window) is None:
            return
        smallest = min(
            max(size)
            for sizes in self.crop_sizes
            for size in (sizes.global_size, sizes.local_size, sizes.gram_size)
            if size
        )
        if side < smallest:
            raise ValueError(f"crops.window {side} is smaller than the smallest crop, which has {smallest} pixels")
        pixels = self.data.pixels
        most = min(self.data.max_pixels, MAX_DECODED_BYTES // pixels.num_bytes)
        if side**2 > most:
            raise ValueError(f"crops.window {side} has {side**2} pixels of {pixels}, more than {most}; lower it")

    @model_validator(mode="after")
    def _check_augmentations(self) -> Config:
        if self.data.augmentations and any(sizes.gram_size for sizes in self.crop_sizes):
            raise ValueError(
                "data.augmentations cannot be combined with a size of the Gram teacher's crops (objective.gram.size, "
                "crops.sizes.N.gram_size): these crops are not augmented, so their patches could show other places"
            )
        return self

    @model_validator(mode="after")
    def _check_fp8_widths(self) -> Config:
        for name, width in (("dim", self.model.dim), ("mlp_hidden", self.model.hidden)):
            if self.engine.fp8 and width % 16:
                raise ValueError(f"model.{name} is {width}; with engine.fp8 it must be a multiple of 16")
        return self

    @model_validator(mode="after")
    def _check_frozen_teacher(self) -> Config:
        if self.teacher.kind == "frozen":
            if self.masks != MasksConfig():
                raise ValueError("masks has no effect with teacher.kind: frozen, whose student gets unmasked crops")
            if self.objective.gram.tokens != "all":
                raise ValueError("objective.gram.tokens must be all with teacher.kind: frozen, which masks no patches")
        if self.teacher.model is not None and (fault := find_teacher_fault(self)):
            raise ValueError(fault)
        return self

    @property
    def crop_sizes(self) -> tuple[CropSizes, ...]:
        """Every set of crop sizes that the steps of the run use."""
        crops, gram = self.crops, self.objective.gram
        size = gram.size if gram.is_active else None
        return tuple(
            CropSizes(
                entry.global_size or crops.global_size, entry.local_size or crops.local_size, entry.gram_size or size
            )
            for entry in crops.sizes
        ) or (CropSizes(crops.global_size, crops.local_size, size),)

    def batch_split(self, world_size: int) -> tuple[int, int]:
        """Return ``(global_batch, accumulation)``: images of a step and micro-batches of a step on each rank.

        Raises:
            ConfigError: micro-batch x ranks does not divide the global batch.
        """
        micro = self.data.micro_batch * world_size
        total = self.data.global_batch or micro
        if total % micro:
            raise ConfigError(
                f"data.global_batch {total} is not a multiple of data.micro_batch {self.data.micro_batch} x "
                f"{world_size} ranks = {micro}; set data.global_batch or data.micro_batch so that it is"
            )
        return total, total // micro

    @property
    def micro_batch_bytes(self) -> int:
        """Bytes of the crops of a micro-batch of one rank."""
        crops, gram = self.crops, self.objective.gram
        pixels = crops.global_count * crops.global_size.pixels + crops.local_count * crops.local_size.pixels
        if gram.is_active and gram.size:
            pixels += crops.global_count * gram.size.pixels
        return self.data.pixels.crop_bytes * pixels * self.data.micro_batch

    @property
    def square_side(self) -> int:
        """Side in pixels of the square inputs of evaluations, feature maps and exports.

        For rectangular global crops: the side of the largest square of whole patches that has no more pixels.
        """
        patch = self.model.patch_size
        return max(math.isqrt(self.crops.global_size.pixels) // patch, 1) * patch

    def batches_ahead(self, world_size: int, *, on_gpu: bool) -> int:
        """Return the number of micro-batches to keep ready: on a GPU all of a step, within ``AHEAD_BYTES``.

        A GPU computes a step while the next one's batches are prepared; a CPU would do both with the same cores.
        """
        _, accumulation = self.batch_split(world_size)
        return min(accumulation, max(1, AHEAD_BYTES // self.micro_batch_bytes)) if on_gpu else 1


def _value(section: Any, name: str) -> Any:
    return section.get(name) if isinstance(section, dict) else getattr(section, name, None)


def _with_default(section: Any, name: str, value: Any) -> Any:
    """Return a section, raw or validated, with a value for a key that is not given."""
    if isinstance(section, BaseModel):
        return section if name in section.model_fields_set else section.model_copy(update={name: value})
    return {name: value, **section} if isinstance(section, dict) else {name: value} if section is None else section


def walk_settings(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the dotted key and the field of every setting below a section; a schedule is one setting."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Schedule:
            yield from walk_settings(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


@cache
def path_settings() -> frozenset[str]:
    return frozenset(key for key, field in walk_settings() if is_path(field))


@cache
def resume_rules() -> dict[str, ResumeRule]:
    return {key: cast(dict, field.json_schema_extra)[RESUME_RULE] for key, field in walk_settings()}


def setting_key(key: str) -> str | None:
    """Return the setting that a dotted key is, or is part of (``schedules.lr`` for ``schedules.lr.peak``), or None."""
    while key and key not in resume_rules():
        key = key.rpartition(".")[0]
    return key or None
