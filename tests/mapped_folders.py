"""Folders of images with masks and depth maps: a striped disc, nearer than its background of other stripes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def mapped_folder(folder: Path, count: int = 20) -> Path:
    """Write ``images/a/*.png``, ``masks/a/*.png`` and ``depth/a/*.npy``.

    Classes are 0 and 3, and the first row is unlabelled; depths are 1.5 and 4.
    """
    rng = np.random.default_rng(count)
    for name in ("images", "masks", "depth"):
        (folder / name / "a").mkdir(parents=True)
    for index in range(count):
        height, width = rng.integers(36, 60, 2)
        rows, columns = np.mgrid[0:height, 0:width]
        centre = rng.uniform(0.3, 0.7, 2) * (height, width)
        is_disc = np.hypot(rows - centre[0], columns - centre[1]) < 13
        wave = np.where(is_disc, np.sin(rows * 0.9), np.sin(columns * 0.9))
        pixels = 128 + wave[..., None] * rng.uniform(40, 120, 3) - 40 * is_disc[..., None]
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / "images" / "a" / f"{index}.png")
        mask = np.where(is_disc, 3, 0).astype(np.uint8)
        mask[0] = 255
        Image.fromarray(mask).save(folder / "masks" / "a" / f"{index}.png")
        np.save(folder / "depth" / "a" / f"{index}.npy", np.where(is_disc, 1.5, 4).astype(np.float32))
    return folder
