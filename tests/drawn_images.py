"""Small generated images and shard sets for tests, and access to their contents."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from shards.packing.pack import PackOptions, pack
from shards.reading.shard_set import ShardSet


def drawn_image(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """Return an RGB image unique to ``number``, with smooth colours that compress well."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    """Encode an image in any format that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def draw_folder(folder: Path, count: int, classes: tuple[str, ...] = ()) -> Path:
    """Write ``count`` JPEGs of different sizes, cycling through class folders if ``classes`` are given."""
    for number in range(count):
        parent = folder / classes[number % len(classes)] if classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        image = drawn_image(number, 32 + number % 7, 24 + number % 5)
        (parent / f"image {number:03d}.jpg").write_bytes(encoded(image))
    return folder


def packed_set(folder: Path, count: int, classes: tuple[str, ...] = (), shard_bytes: int = 20_000) -> ShardSet:
    """Pack generated images into a set of several shards at ``folder/set``."""
    draw_folder(folder / "images", count, classes)
    pack(folder / "images", folder / "set", PackOptions(shard_bytes=shard_bytes))
    return ShardSet.open(folder / "set")


def all_labels(shard_set: ShardSet) -> list[int]:
    return [int(label) for shard in range(shard_set.num_shards) for label in shard_set.records(shard)["label"]]


def all_payloads(shard_set: ShardSet) -> list[bytes]:
    return [shard_set.read(shard, sample) for shard, size in enumerate(shard_set.sizes) for sample in range(size)]


def overwrite(shard_set: ShardSet, shard: int, sample: int, content: bytes, skip: int = 0) -> None:
    """Overwrite bytes of a packed image, after the first ``skip``."""
    with open(shard_set.tar_path(shard), "r+b") as tar:
        tar.seek(int(shard_set.record(shard, sample)["offset"]) + skip)
        tar.write(content)


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in a folder, by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
