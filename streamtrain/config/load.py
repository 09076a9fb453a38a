"""Loading of YAML recipes with ``extends`` and ``a.b=value`` overrides; errors suggest the closest key."""

from __future__ import annotations

import difflib
import itertools
import os
import reprlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from shards.credentials import strip_values
from shards.format.imagery import require_extra
from shards.format.statistics import Moments
from shards.reading.mixture import AnySet, open_sets
from shards.storage.paths import expand_path
from streamtrain.config.data import DataConfig
from streamtrain.config.schedules import Schedule
from streamtrain.config.section import FOLLOWS, SET_STATISTICS, STEPS_PER_EPOCH
from streamtrain.config.set_facts import set_statistics, with_set_pixels
from streamtrain.config.tree import Config, walk_settings
from streamtrain.errors import ConfigError

RESOLVED_NAME = "config.yaml"
# limits of one YAML text, and on the files that a config extends; recipes need about 1 % of them
_MAX_YAML_BYTES, _MAX_YAML_VALUES, _MAX_YAML_DEPTH, _MAX_FILES = 1 << 20, 20_000, 40, 100
_MAX_DIGITS = 1000
_MAX_FAULTS = 20  # in one message
# required kind of value, by the beginning of pydantic's error type
_TYPES = {"int_": "a whole number", "float_": "a number", "bool_": "true or false", "string_type": "text",
          "tuple_type": "a list, such as [0.5, 1]", "finite_number": "a finite number"}  # fmt: skip
# bounds of a number: pydantic's name in the error's context, and the wording of the message
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def preset_folders() -> list[Path]:
    """Return the folders with recipes: of the checkout, or of the installed package."""
    package = Path(__file__).resolve().parent.parent
    return [folder for folder in (package.parent / "configs", package / "configs") if folder.is_dir()]


def find_config(name: str, beside: Path | None = None) -> Path:
    """Return the path of recipe ``name``: a path, a file beside the one that extends it, or a shipped recipe.

    Raises:
        ConfigError: there is no such file; the message names the closest recipe, or all of them.
        ShardError: the path has an unset variable.
    """
    name = expand_path(name)
    folders = [Path(), *([beside] if beside else []), *preset_folders()]
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            # unlike Path.is_file, this returns False for names that the system rejects
            if os.path.isfile(candidate):
                return candidate
    if os.path.isdir(name):
        raise ConfigError(f"config {name!r} is a folder; give a YAML file, or a recipe such as vits16.yaml")
    recipes = sorted({path.name for folder in preset_folders() for path in folder.glob("*.yaml")})
    stems = [recipe.removesuffix(".yaml") for recipe in recipes]
    if close := difflib.get_close_matches(name.removesuffix(".yaml"), stems, 1):
        raise ConfigError(f"no config {name!r}; did you mean {close[0]}.yaml?")
    raise ConfigError(f"no config {name!r}; give a path, or one of the recipes {', '.join(recipes)}")


def read_raw(
    path: Path, seen: tuple[Path, ...] = (), counter: Iterator[int] | None = None, reshaped: set[str] | None = None
) -> dict[str, Any]:
    """Return the mapping of a YAML file, merged over the files it ``extends``.

    Args:
        counter: counts the files.
        reshaped: see ``override``.

    Raises:
        ConfigError: the file is not YAML, not a mapping, extends itself, or extends too many files.
    """
    counter = itertools.count() if counter is None else counter
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself")
    if next(counter) >= _MAX_FILES:
        raise ConfigError(f"{(*seen, path)[0]} extends more than {_MAX_FILES} files")
    try:
        with open(path, "rb") as file:
            raw = parse_yaml(file.read(_MAX_YAML_BYTES + 1))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must contain sections (run:, data:, ...), not a {type(raw).__name__}")
    parents = raw.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends must be a file name or a list of file names, not {reprlib.repr(parents)}")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, read_raw(find_config(parent, path.parent), (*seen, path.resolve()), counter, reshaped))
    return override(merged, raw, reshaped) if parents else raw


class _BoundedLoader(yaml.SafeLoader):
    """Builds plain values from YAML in bounded time: few values and levels, no aliases, no repeated keys."""

    num_values = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # a few lines of nested aliases can expand to more than fits in memory
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"aliases such as *{self.peek_event().anchor} are not supported; repeat the value")
        self.num_values += 1
        self.depth += 1
        if self.num_values > _MAX_YAML_VALUES:
            raise ValueError(f"it has more than {_MAX_YAML_VALUES:,} values")
        if self.depth > _MAX_YAML_DEPTH:
            raise ValueError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(key for index, key in enumerate(keys) if key in keys[:index])
            raise ValueError(f"the key {reprlib.repr(twice)} occurs twice{node.start_mark}")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_DIGITS:
            raise ValueError(f"a number has {len(node.value):,} digits")
        return super().construct_yaml_int(node)


_BoundedLoader.add_constructor("tag:yaml.org,2002:int", _BoundedLoader.construct_yaml_int)


def parse_yaml(content: bytes) -> Any:
    """Return the value of an untrusted YAML document.

    Raises:
        ValueError: it is not valid YAML, too large or nested too deeply; the message is one line.
    """
    if len(content) > _MAX_YAML_BYTES:
        raise ValueError("it is too large")
    try:
        # as yaml.safe_load does: a SafeLoader builds plain values only, and refuses tags of Python objects
        loader = _BoundedLoader(content)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    # PyYAML raises almost any exception for malformed values, such as an unhashable key or a date in month 13
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"a value is malformed ({type(error).__name__})") from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``over``: mappings merge key by key, other values replace."""
    result = dict(base)
    for key, value in over.items():
        are_mappings = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if are_mappings else value
    return result


def override(
    base: dict[str, Any], over: dict[str, Any], reshaped: set[str] | None = None, prefix: str = ""
) -> dict[str, Any]:
    """Return ``merge`` of a recipe and settings that override it, but let a number keep the shape of a schedule.

    ``schedules.lr=1e-3`` replaces the peak of the recipe's schedule, or of the default one if the recipe has none. Zero
    stays a constant, which disables a weight.

    Args:
        reshaped: receives the keys of the schedules with a new peak.
        prefix: of the keys in ``base`` and ``over``.
    """
    result = dict(base)
    for name, value in over.items():
        key, before = f"{prefix}{name}", result.get(name)
        if key in default_schedules() and (shaped := _replace_peak(key, before, value)):
            result[name] = shaped
            if reshaped is not None:
                reshaped.add(key)
        elif key not in default_schedules() and isinstance(value, dict) and isinstance(before or {}, dict):
            result[name] = override(before or {}, value, reshaped, f"{key}.")
        else:
            result = merge(result, {name: value})
    return result


@cache
def default_schedules() -> dict[str, Schedule]:
    """Return the default of every schedule, by key."""
    return {key: field.default for key, field in walk_settings() if field.annotation is Schedule}


def _replace_peak(key: str, before: Any, value: Any) -> dict[str, Any] | None:
    """Return the schedule ``before`` with the number ``value`` as its peak; None if it has no shape to keep."""
    try:
        is_zero = not float(value)
    except (TypeError, ValueError):
        return None
    raw = default_schedules()[key].model_dump(exclude_defaults=True) if before is None else before
    return {**raw, "peak": value} if isinstance(raw, dict) and raw.keys() - {"peak"} and not is_zero else None


def describe_shape(key: str, config: Config) -> str | None:
    """Return a line on a schedule whose peak was given as a number; None if it is a constant after all."""
    schedule: Any = config
    for name in key.split("."):
        schedule = getattr(schedule, name)
    shape = schedule.model_dump(exclude_defaults=True, exclude={"peak"})
    if not shape:
        return None
    words = ", ".join(f"{name} {value:g}" for name, value in shape.items() if name != "kind")
    constant = {"peak": schedule.peak} | {name: Schedule.model_fields[name].default for name in shape}
    flow = yaml.safe_dump(constant, default_flow_style=True, sort_keys=False, width=1000).strip()
    return (
        f"{key}: peak {schedule.peak:g}; the recipe's shape is kept ({schedule.kind}, {words}); for a constant, set "
        f"'{key}={flow}'"
    )


def parse_override(text: str) -> dict[str, Any]:
    """Return ``a.b=value`` as a nested mapping; the value is parsed as YAML, but may begin with #.

    Raises:
        ConfigError: there is no ``=`` or no key, or the value is not YAML.
    """
    path, separator, value = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys) or len(keys) > _MAX_YAML_DEPTH:
        raise ConfigError(f"override {reprlib.repr(text)} does not have the form section.key=value")
    try:
        nested: Any = parse_yaml(value.encode(errors="surrogateescape"))
    except ValueError as error:
        raise ConfigError(f"the value of {reprlib.repr(text)} is not YAML: {error}") from None
    if nested is None and value.strip().startswith("#"):
        nested = value.strip()  # a colour, which YAML takes for a comment
    for key in reversed(keys):
        nested = {key: nested}
    return nested


def load_config(
    name: str, overrides: Sequence[str] = (), world_size: int = 1, reshaped: set[str] | None = None
) -> Config:
    """Return the configuration of recipe ``name`` with ``overrides``; all values are merged before validation.

    Lengths in epochs become steps, based on the size of ``data.shards`` and the batch of ``world_size`` ranks. For
    ``reshaped`` see ``override``.

    Raises:
        ConfigError: one line that names each invalid key.
        ShardError: a length is in epochs and the shard set cannot be read.
    """
    raw = read_raw(find_config(name), reshaped=reshaped)
    for text in overrides:
        raw = override(raw, parse_override(text), reshaped)
    return build_for_set(raw, world_size)


def build_for_set(raw: dict[str, Any], world_size: int = 1) -> Config:
    """Return the validated configuration of a raw mapping, with the values that follow from ``data.shards``.

    Raises: as ``load_config``.
    """
    if not (isinstance(raw.get("data"), dict) and raw["data"].get("shards")):
        return build(raw)
    raw = {**raw, "data": with_set_pixels(raw["data"])}
    return build(raw, partial(_steps_per_epoch, raw, world_size), partial(set_statistics, raw["data"]))


def build(
    raw: dict[str, Any],
    steps_per_epoch: Callable[[], float] | None = None,
    set_statistics: Callable[[], Moments] | None = None,
) -> Config:
    """Return the validated configuration of a raw mapping.

    Raises:
        ConfigError: one line that names each invalid key.
    """
    try:
        return Config.model_validate(raw, context={STEPS_PER_EPOCH: steps_per_epoch, SET_STATISTICS: set_statistics})
    except ValidationError as error:
        raise ConfigError("; ".join(islice(_explain(error), _MAX_FAULTS))) from None


def _steps_per_epoch(raw: dict[str, Any], world_size: int) -> float:
    """Return the images of the shard sets divided by the global batch; called only for lengths in epochs."""
    data = DataConfig.model_validate(raw["data"])
    batch = data.global_batch or data.micro_batch * world_size
    return _open(data).num_samples / batch


def open_shard_set(config: Config) -> AnySet:
    """Return the shard set or mixture of ``data.shards``.

    Raises:
        ConfigError: ``data.shards`` is empty, or its images have other channels or another dtype than the settings.
        ShardError: a shard set is missing or incomplete.
    """
    if not config.data.shards:
        raise ConfigError("data.shards is not set; pack images with streamtrain pack and give data.shards=SET")
    shard_set, pixels = _open(config.data), config.data.pixels
    if shard_set.pixels != pixels:
        found = shard_set.pixels
        raise ConfigError(
            f"{config.data.shards_text} has images of {found}, the settings say {pixels}; set "
            f"data.channels={found.channels} data.dtype={found.dtype}"
        )
    if not pixels.is_rgb or config.crops.window is not None:
        require_extra()
    return shard_set


def _open(data: DataConfig) -> AnySet:
    return open_sets([(share.shards, share.weight) for share in data.shares], data.remote.retry_policy)


def read_resolved(run_dir: str | Path) -> Config:
    """Return the configuration of a run directory.

    Raises:
        ConfigError: the directory has no configuration.
    """
    path = Path(run_dir) / RESOLVED_NAME
    if not path.is_file():
        reason = f"it has no {RESOLVED_NAME}" if path.parent.is_dir() else "it does not exist"
        raise ConfigError(f"{run_dir} is not a run directory: {reason}")
    return build(read_raw(path))


def to_yaml(config: Config) -> str:
    """Return the settings as YAML, without the credentials in URLs: it is written to run directories and logs."""
    return yaml.safe_dump(strip_values(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _explain(error: ValidationError) -> Iterator[str]:
    """Yield one phrase per fault: the key, the required value, and the value given."""
    faults = error.errors()
    faulty = {fault["loc"] for fault in faults}
    for fault in faults:
        if fault["type"] == "too_short" and any(loc[: len(fault["loc"])] == fault["loc"] != loc for loc in faulty):
            continue  # the list is too short because of invalid items, which have faults of their own
        if fault["type"] == FOLLOWS:
            continue
        key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("<"))
        if fault["type"] == "extra_forbidden":
            yield unknown_key_message(key)
            continue
        message = _message(fault["type"], fault.get("ctx", {})) or fault["msg"].removeprefix("Value error, ")
        value = "" if isinstance(fault["input"], dict) else f" (got {reprlib.repr(fault['input'])})"
        yield f"{key}: {message}{value}" if key else message


def _message(kind: str, context: dict[str, Any]) -> str | None:
    """Return the message of a frequent fault, or None for pydantic's own."""
    for name, word in _BOUNDS.items():
        if name in context:
            return f"must be {word} {context[name]}"
    if kind == "too_short":
        return f"must have at least {context['min_length']} item"
    if kind in ("model_type", "dict_type", "dataclass_type"):
        return "must be a mapping, {key: value, ...}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    return next((f"must be {what}" for start, what in _TYPES.items() if kind.startswith(start)), None)


def unknown_key_message(key: str) -> str:
    """Return the message for an unknown key, with the closest known key if there is one."""
    closest = _find_closest(key)
    return f"unknown key {key}" + (f"; did you mean {closest}?" if closest else "")


def _find_closest(key: str) -> str | None:
    """Return the known key most like ``key``: in the same section, else with the same last name in another one."""
    known = list(known_keys())
    parent, _, name = key.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent}
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    for candidates in (
        difflib.get_close_matches(name, siblings, 1, 0.6),
        difflib.get_close_matches(key, elsewhere, 1, 0.0),
    ):
        if candidates:
            return siblings.get(candidates[0], candidates[0])
    close = difflib.get_close_matches(key, known, 1, 0.6)
    return close[0] if close else None


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every section and key below ``section``, including keys of schedules."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")
