"""Which shipped recipe a configuration comes from, and the settings in which it differs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from streamtrain.config.load import build, preset_folders, read_raw
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError

# keys of paths, which say nothing about the recipe
_PATHS = ("run.dir", "data.shards", "evaluation.train", "evaluation.test", "evaluation.reference", "init.weights")


def changed_settings(config: Config, base: Config) -> dict[str, Any]:
    """Return by dotted key the values of ``config`` that differ from those of ``base``, without paths."""
    expected = dict(leaves(base))
    return {key: value for key, value in leaves(config) if key not in _PATHS and value != expected[key]}


def nearest_recipe(config: Config) -> tuple[str, dict[str, Any]]:
    """Return the name of the shipped recipe with the fewest different settings, and those settings.

    The name is empty if no recipe is installed; then the settings are compared with their defaults.
    """
    found = [(name, changed_settings(config, recipe)) for name, recipe in _recipes().items()]
    return min(found, key=lambda each: len(each[1]), default=("", changed_settings(config, Config())))


def read_recipe(name: str) -> Config:
    """Return the shipped recipe ``name``, with epochs of one step; raises ConfigError if there is none."""
    if name not in _recipes():
        raise ConfigError(f"{name} is no shipped recipe; they are {', '.join(_recipes())}")
    return _recipes()[name]


def leaves(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of each setting."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@cache
def _recipes() -> dict[str, Config]:
    recipes = {}
    for path in sorted(path for folder in preset_folders()[:1] for path in folder.glob("*.yaml")):
        try:
            # one epoch is one step: the size of the data is unknown here
            recipes[path.name] = build(read_raw(path), lambda: 1.0)
        except ConfigError:
            continue  # a file of the user in the folder of the recipes
    return recipes
