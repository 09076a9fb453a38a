"""Small images drawn for tests, and shard sets of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from shards.packing.pack import PackOptions, pack
from shards.reading.shard_set import ShardSet


def drawn_image(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """An RGB image that no other number has: smooth colours, so that JPEG keeps them small."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    """An image's bytes in a format that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def draw_folder(folder: Path, count: int, classes: tuple[str, ...] = ()) -> Path:
    """Write ``count`` JPEGs of differing sizes, in class folders by turns if there are classes."""
    for number in range(count):
        parent = folder / classes[number % len(classes)] if classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        image = drawn_image(number, 32 + number % 7, 24 + number % 5)
        (parent / f"image {number:03d}.jpg").write_bytes(encoded(image))
    return folder


def packed_set(folder: Path, count: int, classes: tuple[str, ...] = (), shard_bytes: int = 20_000) -> ShardSet:
    """A shard set of drawn images under ``folder``, in several shards."""
    draw_folder(folder / "images", count, classes)
    pack(folder / "images", folder / "set", PackOptions(shard_bytes=shard_bytes))
    return ShardSet.open(folder / "set")
