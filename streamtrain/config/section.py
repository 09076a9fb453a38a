"""Base class, field helpers and value types of the configuration sections."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from shards.format.pixels import MAX_CHANNELS
from shards.storage.paths import expand_path
from shards.storage.store import is_url


class Section(BaseModel):
    """A frozen group of keys; unknown keys and non-finite numbers raise an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


ResumeRule = Literal["free", "accept", "fixed"]
# JSON-schema keys of a setting's resume rule and of the name of its value type
RESUME_RULE, VALUE_TYPE = "resume", "value_type"


def setting(rule: ResumeRule, default: Any, description: str, **limits: Any) -> Any:
    """Return a pydantic field with a description and a resume rule; ``...`` as the default makes it required.

    The rules, which ``streamtrain.run.resume_policy`` enforces and ``streamtrain config`` shows:
        free: may change when a run resumes, because results depend on it by rounding at most.
        accept: changes results, so a resumed run needs ``--accept KEY``.
        fixed: may not change, because the checkpoint or the order of the images would no longer fit.
    """
    return Field(default, description=description, json_schema_extra={RESUME_RULE: rule}, **limits)


free, accept, fixed = (partial(setting, rule) for rule in ("free", "accept", "fixed"))


# in a collection of accepted keys: accepts all settings that can be accepted
ACCEPT_ALL = "*"


def is_accepted(key: str, accepted: Collection[str]) -> bool:
    """Return whether a change of the setting is accepted on the command line."""
    return key in accepted or ACCEPT_ALL in accepted


Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0)]
Range = tuple[float, float]


class ImageSize(NamedTuple):
    """Height and width of an image in pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, value: Any) -> ImageSize:
        """Return the size that a setting states: the side of a square, or ``[height, width]``.

        Raises:
            ValueError: it states neither.
        """
        try:
            return cls(*_SIDES.validate_python(value if isinstance(value, list | tuple) else (value, value)))
        except ValidationError:
            raise ValueError("must be a whole number of pixels above 0, or two: [height, width]") from None

    def __str__(self) -> str:
        return str(self.height) if self.is_square else f"{self.height}x{self.width}"

    @property
    def is_square(self) -> bool:
        return self.height == self.width

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def aspect(self) -> float:
        """Width / height."""
        return self.width / self.height

    def fits(self, patch_size: int) -> bool:
        """Return whether both sides are multiples of the patch size."""
        return not (self.height % patch_size or self.width % patch_size)

    def grid(self, patch_size: int) -> tuple[int, int]:
        """Return the number of patches (down, across)."""
        return self.height // patch_size, self.width // patch_size

    def patches(self, patch_size: int) -> int:
        rows, columns = self.grid(patch_size)
        return rows * columns


def _as_setting(size: ImageSize) -> int | list[int]:
    return size.height if size.is_square else list(size)


_SIDES = TypeAdapter(tuple[Positive, Positive])
_SIZE_TYPE: dict[str, Any] = {VALUE_TYPE: "side of a square, or [height, width]"}
CropSize = Annotated[
    ImageSize,
    PlainValidator(ImageSize.of),
    PlainSerializer(_as_setting),
    Field(json_schema_extra=_SIZE_TYPE),
]

# Text that is a path. Every setting that holds a path has this type, so that `~` and variables are expanded.
EXPANDED = AfterValidator(expand_path)
PathOrUrl = Annotated[str, Field(min_length=1, json_schema_extra={VALUE_TYPE: "path"}), EXPANDED]


def _refuse_url(path: str) -> str:
    if is_url(path):
        # a path such as s3://bucket/run would be a folder called "s3:"
        raise ValueError(f"{path} is a URL; give a local path")
    return path


PathText = Annotated[PathOrUrl, AfterValidator(_refuse_url)]


def is_path(field: FieldInfo) -> bool:
    """Return whether a setting is a path, or can be one."""

    def is_expanded(kind: Any) -> bool:
        return kind is EXPANDED or any(map(is_expanded, get_args(kind)))

    return any(map(is_expanded, (*field.metadata, field.annotation)))


# key of the validation context: a function without arguments that returns the steps of an epoch
STEPS_PER_EPOCH = "steps_per_epoch"
# key of the validation context: a function without arguments that returns the statistics of the images
SET_STATISTICS = "set_statistics"
# error type of a value that follows from settings which have faults of their own
FOLLOWS = "follows"
_Result = TypeVar("_Result")


def resolve(function: Callable[[], _Result]) -> _Result:
    """Return the result of a function of the validation context, or raise ``FOLLOWS`` if its settings are invalid."""
    try:
        return function()
    except ValidationError:
        raise PydanticCustomError(FOLLOWS, "follows from invalid settings") from None


_EPOCHS = re.compile(r"^\s*(\d+(?:\.\d*)?)\s*epochs?\s*$")


def _epochs_to_steps(value: Any, info: ValidationInfo) -> Any:
    """Convert text such as ``"10 epochs"`` to steps; return any other value unchanged."""
    match = _EPOCHS.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    steps_per_epoch: Callable[[], float] | None = (info.context or {}).get(STEPS_PER_EPOCH)
    if steps_per_epoch is None:
        raise ValueError("a length in epochs needs a set of images; give data.shards")
    return round(float(match[1]) * resolve(steps_per_epoch))


_STEPS: dict[str, Any] = {VALUE_TYPE: 'steps (or "N epochs")'}
Steps = Annotated[int, BeforeValidator(_epochs_to_steps), Field(ge=0, json_schema_extra=_STEPS)]
PositiveSteps = Annotated[int, BeforeValidator(_epochs_to_steps), Field(ge=1, json_schema_extra=_STEPS)]


# bytes of each unit: powers of 1000 and of 1024
_UNITS = {"B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*")


# a smaller number without a unit is meant in another unit than bytes
MIN_BARE_BYTES = 1000


def parse_bytes(text: str, min_bare: int = MIN_BARE_BYTES) -> int:
    """Return the bytes of ``80GB``, ``139 GiB`` or a bare number of at least ``min_bare``.

    Raises:
        ValueError: the text is not such a size.
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get((match[2] or "B").upper()) if match else None
    if match is None or unit is None:
        raise ValueError("must be a size such as 80GB or 139GiB, or a number of bytes")
    if not match[2] and 0 < float(match[1]) < min_bare:
        raise ValueError(f"{match[1]} without a unit is {match[1]} bytes; write {match[1]}MB or {match[1]}GB")
    return round(float(match[1]) * unit)


def _parse_size(value: Any) -> Any:
    is_small = type(value) in (int, float) and 0 < value < MIN_BARE_BYTES
    return parse_bytes(f"{value:g}" if is_small else value) if is_small or isinstance(value, str) else value


Size = Annotated[
    int, BeforeValidator(_parse_size), Field(ge=1, json_schema_extra={VALUE_TYPE: "bytes (such as 200GB)"})
]


def within(name: str, low: float, high: float) -> AfterValidator:
    """Return a validator of a ``Range`` from ``low`` to ``high``; errors call it ``name``."""

    def check(bounds: Range) -> Range:
        if not low <= bounds[0] <= bounds[1] <= high:
            raise ValueError(f"{name} must be two ascending numbers within [{low}, {high}], not {list(bounds)}")
        return bounds

    return AfterValidator(check)
