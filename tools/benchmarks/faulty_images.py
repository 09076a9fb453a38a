"""Folders of images with a fault, made from good ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from shards.format.decode import decode


def _shuffle(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the pixels of an image in random order, each with its colour."""
    return rng.permutation(pixels.reshape(-1, pixels.shape[2])).reshape(pixels.shape)


def _blank(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an image of one grey value: the same for all images."""
    return np.full_like(pixels, 127)


# an image without its fault, and None for copies of the first image
FAULTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray] | None] = {
    "good": lambda pixels, _: pixels,
    "shuffled": _shuffle,
    "blank": _blank,
    "equal": None,
}


def write_images(source: Path, target: Path, fault: str, count: int) -> None:
    """Write ``count`` images of the class folders in ``source`` with a fault, as PNG in the same class folders.

    An existing ``target`` is kept. Images are taken from all classes in turn.
    """
    if target.exists():
        return
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    listed = [sorted(path for path in folder.iterdir() if path.suffix != ".json") for folder in folders]
    each = -(-count // len(folders))
    paths = [path for files in listed for path in files[:each]][:count]
    change, rng = FAULTS[fault], np.random.default_rng(0)
    for number, path in enumerate(paths):
        pixels = decode((paths[0] if change is None else path).read_bytes())
        folder = target / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels if change is None else change(pixels, rng)).save(folder / f"{number:05d}.png")
