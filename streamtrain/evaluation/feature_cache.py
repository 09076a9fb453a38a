"""Features kept in the user's cache, so that another evaluation of the same network and images need not compute them.

A file is named by a digest of everything that its features depend on: images, weights, preprocessing, arithmetic, code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import shards
from shards.errors import ShardError
from shards.format.files import cache_folder, make_private_folder, write_whole
from streamtrain.evaluation.images import LabelledImages
from streamtrain.model.vit import VisionTransformer
from streamtrain.ops.cpu.features import cpu_features

logger = logging.getLogger(__name__)

MAX_BYTES = 4 << 30
# of the free disk space that all cached features may take
MAX_SHARE = 0.25
_NAME = "features"


def feature_key(images: LabelledImages, model: VisionTransformer | None, settings: Mapping[str, Any]) -> str | None:
    """Return the name of the features in the cache; None: they cannot be cached.

    Args:
        model: the network; None: the features are pixels.
        settings: of preprocessing and network, which neither images nor weights contain.
    """
    # the code of another class of network is not known here
    if images.identify is None or (model is not None and type(model) is not VisionTransformer):
        return None
    try:
        identity = images.identify()
    except (OSError, ShardError):
        return None
    parts = {"images": identity, "settings": settings, "code": _code_digest()}
    if model is not None:
        parts |= {"weights": weights_digest(model), "arithmetic": _arithmetic(next(model.parameters()))}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def features_folder() -> Path | None:
    """Return the folder of cached features, or None if this user cannot have one."""
    try:
        folder = cache_folder("the cache") / _NAME
        make_private_folder(folder, "the cache")
    except ShardError as error:
        logger.debug("features are not cached: %s", error)
        return None
    return folder


def load_features(key: str, rows: int) -> Tensor | None:
    """Return the cached features [rows, dim]; None if they are missing or damaged."""
    if (folder := features_folder()) is None:
        return None
    path = folder / f"{key}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            features, stated = file.get_tensor(_NAME), (file.metadata() or {}).get("sha256")
        if features.dim() != 2 or len(features) != rows or _tensor_digest(features) != stated:
            return None
        # the files that were unused for longest are removed first
        os.utime(path)
    except (OSError, SafetensorError):
        return None
    return features


def store_features(key: str, features: Tensor) -> None:
    """Store features [rows, dim], and remove the oldest ones beyond the limit; a failure is no error."""
    if (folder := features_folder()) is None:
        return
    try:
        files = {path: path.stat() for path in folder.iterdir()}
        used = sum(status.st_size for status in files.values())
        limit = min(MAX_BYTES, int((shutil.disk_usage(folder).free + used) * MAX_SHARE))
        content = features.nbytes + 4096
        if content > limit:
            return
        for path in sorted(files, key=lambda path: files[path].st_mtime):
            if used + content <= limit:
                break
            path.unlink(missing_ok=True)
            used -= files[path].st_size
        write_whole(
            folder / f"{key}.safetensors", save({_NAME: features}, metadata={"sha256": _tensor_digest(features)})
        )
    except OSError as error:
        logger.debug("features are not cached: %s", error)
        with suppress(OSError):
            (folder / f".{key}.safetensors.partial").unlink(missing_ok=True)


def weights_digest(model: VisionTransformer) -> str:
    """Return a digest of the names, types, shapes and values of a network's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _tensor_digest(features: Tensor) -> str:
    return hashlib.sha256(_bytes(features)).hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _arithmetic(parameter: Tensor) -> list[str]:
    """Return what decides the rounding: features differ slightly between devices."""
    if parameter.device.type != "cpu":
        return [torch.cuda.get_device_name(parameter.device)]
    return [*sorted(cpu_features()), torch.backends.cpu.get_cpu_capability()]


@cache
def _code_digest() -> str:
    """Return a digest of the code that computes features, and of the versions of the libraries that it uses."""
    root, shards_root = Path(__file__).parents[1], Path(shards.__file__).parent
    folders = [shards_root / "format", root / "data", root / "model", root / "ops", root / "evaluation"]
    digest = hashlib.sha256(f"{torch.__version__} {PIL.__version__}".encode())
    for folder in folders:
        for path in sorted(folder.rglob("*.[cph]*")):
            if path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def cached_features(
    images: LabelledImages,
    model: VisionTransformer | None,
    settings: Mapping[str, Any],
    compute: Callable[[LabelledImages], tuple[Tensor, Tensor]],
    is_used: bool = True,
) -> tuple[Tensor, Tensor, bool]:
    """Return the features [N, dim] of images, bool [N] whether an image is usable, and whether they were cached.

    Features are cached only if all images are usable: an image that cannot be read today may be read tomorrow.

    Args:
        compute: returns the first two, if they are not cached.
        is_used: False: neither read nor write the cache.
    """
    key = feature_key(images, model, settings) if is_used else None
    if key is not None and (found := load_features(key, len(images))) is not None:
        return found, torch.ones(len(images), dtype=torch.bool), True
    features, is_usable = compute(images)
    if key is not None and is_usable.all():
        store_features(key, features)
    return features, is_usable, False
