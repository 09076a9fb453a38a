"""Settings that follow the images of ``data.shards``: their channels and dtype, and their statistics."""

from __future__ import annotations

import reprlib
from dataclasses import asdict
from typing import Any

from shards.credentials import strip_credentials
from shards.errors import ShardError
from shards.format.set_manifest import SetManifest
from shards.format.statistics import Moments
from shards.storage.paths import expand_path
from shards.storage.store import Store, is_url
from streamtrain.config.data import DataConfig
from streamtrain.errors import ConfigError


def with_set_pixels(data: dict[str, Any]) -> dict[str, Any]:
    """Return a raw ``data`` section with the channels and the dtype of a local set that is not 8-bit RGB.

    Raises:
        ConfigError: the section says otherwise.
    """
    shards = data["shards"]
    path = shards[0].get("shards") if isinstance(shards, list) and shards and isinstance(shards[0], dict) else shards
    if not isinstance(path, str) or is_url(path):
        return data
    try:
        pixels = SetManifest.load(expand_path(path)).pixels
    except ShardError:
        return data  # opening the set raises it again
    for name, value in asdict(pixels).items():
        if data.get(name) not in (None, value):
            raise ConfigError(
                f"data.{name} is {reprlib.repr(data[name])}, but {path} has images of {pixels}; remove data.{name}, "
                "which follows the set"
            )
    return {**data, **({} if pixels.is_rgb else asdict(pixels))}


def set_statistics(raw: dict[str, Any]) -> Moments:
    """Return mean and deviation of the images of a raw ``data`` section; called only for ``from_set``."""
    data = DataConfig.model_validate(raw)
    names = [strip_credentials(share.shards) for share in data.shares]
    manifests = [_load_manifest(share.shards, data) for share in data.shares]
    for name, manifest in zip(names, manifests, strict=True):
        if manifest.statistics is None:
            raise ConfigError(f"{name} has no statistics for from_set; compute them: streamtrain stats {name}")
        if manifest.pixels != manifests[0].pixels:
            found = f"{names[0]} has {manifests[0].pixels}, but {name} has {manifest.pixels}"
            raise ConfigError(f"{found}; from_set needs sets of the same channels and dtype")
    statistics = [manifest.statistics for manifest in manifests if manifest.statistics is not None]
    return Moments.of_mixture(statistics, [share.weight for share in data.shares])


def _load_manifest(location: str, data: DataConfig) -> SetManifest:
    if is_url(location):
        return SetManifest.fetch(Store(location, data.remote.retry_policy))
    return SetManifest.load(location)
