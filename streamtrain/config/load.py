"""YAML with ``extends``, ``a.b=value`` overrides, and errors that name the key and the nearest right one."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from shards.reading.mixture import AnySet, open_sets
from streamtrain.config.data import DataConfig
from streamtrain.config.section import STEPS_PER_EPOCH
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError

RESOLVED_NAME = "config.yaml"
_MAX_YAML_BYTES = 1 << 20
# faults told at a time
_MAX_FAULTS = 20
# what a value must be, by the beginning of a validation error's type
_TYPES = {"int_": "a whole number", "float_": "a number", "bool_": "true or false", "string_type": "text"}
# how the bounds of a number are called in such an error's context, and here
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def preset_folders() -> list[Path]:
    """Folders that hold the recipes: of a checkout, and of an installed package."""
    package = Path(__file__).resolve().parent.parent
    return [folder for folder in (package.parent / "configs", package / "configs") if folder.is_dir()]


def find_config(name: str, beside: Path | None = None) -> Path:
    """Path of the recipe ``name``: as given, beside the file that extends it, or among the presets.

    Raises:
        ConfigError: if there is no such file; the message lists the presets.
    """
    folders = [Path(), *([beside] if beside else []), *preset_folders()]
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            # a name that the system does not even look for raises there, and not here
            if os.path.isfile(candidate):
                return candidate
    presets = sorted({path.name for folder in preset_folders() for path in folder.glob("*.yaml")})
    raise ConfigError(f"no config {name!r}; give a path, or one of the presets {', '.join(presets)}")


def read_raw(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a YAML file merged over the file(s) it ``extends``.

    Raises:
        ConfigError: for a file that is not YAML, not a mapping, or extends itself.
    """
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself")
    try:
        with open(path, "rb") as file:
            raw = parse_yaml(file.read(_MAX_YAML_BYTES + 1)) or {}
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold sections (run:, data:, ...), not a {type(raw).__name__}")
    parents = raw.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends takes the name of a file, or a list of names, not {reprlib.repr(parents)}")
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = merge(merged, read_raw(find_config(parent, path.parent), (*seen, path.resolve())))
    return merge(merged, raw)


def parse_yaml(content: bytes) -> Any:
    """The value of a YAML document that comes from anywhere.

    Raises:
        ValueError: it is none, or too large or too deep to be one of ours; in one line.
    """
    if len(content) > _MAX_YAML_BYTES:
        raise ValueError("it is too large")
    try:
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            # a few lines of them can stand for more than any memory holds
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has an alias, *{event.anchor}; write its value out")
        return yaml.safe_load(content)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``: mappings merge key by key, anything else replaces."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def parse_override(text: str) -> dict[str, Any]:
    """The nested mapping of one ``a.b=value``; the value is read as YAML.

    Raises:
        ConfigError: if there is no ``=`` or no key.
    """
    path, separator, value = text.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {text!r} is not of the form section.key=value")
    try:
        nested: Any = parse_yaml(value.encode(errors="surrogateescape"))
    except ValueError as error:
        raise ConfigError(f"the value of {text!r} is not YAML: {error}") from None
    for key in reversed(keys):
        nested = {key: nested}
    return nested


def load_config(name: str, overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """The configuration of recipe ``name`` with ``overrides`` applied, merged raw and validated once.

    Lengths in epochs become steps here, by the size of ``data.shards`` and the batch of ``world_size`` ranks.

    Raises:
        ConfigError: one line that names each faulty key.
        ShardError: if a length is in epochs and the set is not there.
    """
    raw = read_raw(find_config(name))
    for override in overrides:
        raw = merge(raw, parse_override(override))
    given = isinstance(raw.get("data"), dict) and raw["data"].get("shards")
    return build(raw, partial(_steps_per_epoch, raw, world_size) if given else None)


def build(raw: dict[str, Any], steps_per_epoch: Callable[[], float] | None = None) -> Config:
    """Validate a raw mapping; errors become one line."""
    try:
        return Config.model_validate(raw, context={STEPS_PER_EPOCH: steps_per_epoch})
    except ValidationError as error:
        raise ConfigError("; ".join(islice(_explain(error), _MAX_FAULTS))) from None


def _steps_per_epoch(raw: dict[str, Any], world_size: int) -> float:
    """Steps of as many samples as the sets of a raw configuration hold; opened only where something is in epochs."""
    data = DataConfig.model_validate(raw["data"])
    batch = data.global_batch or data.micro_batch * world_size
    return _open(data).num_samples / batch


def open_shard_set(config: Config) -> AnySet:
    """The shard set, or sets, that ``data.shards`` names; call it before any process group starts.

    Raises:
        ConfigError: the key is empty.
        ShardError: there is no such set, or it is not whole.
    """
    if not config.data.shards:
        raise ConfigError("data.shards is not set; pack images with streamtrain pack and give data.shards=SET")
    return _open(config.data)


def _open(data: DataConfig) -> AnySet:
    return open_sets([(share.shards, share.weight) for share in data.shares], data.remote.retry_policy)


def read_resolved(run_dir: str | Path) -> Config:
    """The configuration a run folder was started with.

    Raises:
        ConfigError: if the folder holds none.
    """
    path = Path(run_dir) / RESOLVED_NAME
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it has no {RESOLVED_NAME}")
    return build(read_raw(path))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(error: ValidationError) -> Iterator[str]:
    """One phrase a fault: the key, what is wrong, and what was given."""
    faults = error.errors()
    faulty = {fault["loc"] for fault in faults}
    for fault in faults:
        if fault["type"] == "too_short" and any(loc[: len(fault["loc"])] == fault["loc"] != loc for loc in faulty):
            continue  # the items that were wrong are missing from the list; they are told of by themselves
        key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("<"))
        if fault["type"] == "extra_forbidden":
            near = _nearest(key)
            yield f"unknown key {key}" + (f"; did you mean {near}?" if near else "")
            continue
        message = _message(fault["type"], fault.get("ctx", {})) or fault["msg"].removeprefix("Value error, ")
        value = "" if isinstance(fault["input"], dict) else f" (got {reprlib.repr(fault['input'])})"
        yield f"{key}: {message}{value}" if key else message


def _message(kind: str, context: dict[str, Any]) -> str | None:
    """The commonest faults in our words; None of any other."""
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


def _nearest(wrong: str) -> str | None:
    """The known key most like ``wrong``: a sibling first, else the same last name in another section."""
    known = list(_keys(Config))
    parent, _, name = wrong.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    for candidates in (difflib.get_close_matches(name, siblings, 1, 0.6), elsewhere):
        if candidates:
            return siblings.get(candidates[0], candidates[0])
    close = difflib.get_close_matches(wrong, known, 1, 0.6)
    return close[0] if close else None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of every key below ``model``."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
