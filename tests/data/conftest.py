"""Small shard sets of drawn images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.format.index import save_index
from shards.packing.pack import PackOptions, pack
from shards.reading.shard_set import ShardSet
from streamtrain.config.crops import CropsConfig
from streamtrain.config.data import DataConfig
from streamtrain.config.run import RunConfig
from streamtrain.config.tree import Config


def draw_image(number: int, width: int, height: int) -> Image.Image:
    """A smooth picture that no other number has."""
    rng = np.random.default_rng(number)
    tiles = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 26 pictures of many shapes: mostly RGB JPEGs, and one each grey, CMYK, PNG with alpha, WebP."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(22):
        draw_image(number, 40 + 7 * number, 90 - 2 * number).save(folder / f"{number:02}.jpg", quality=90)
    draw_image(22, 64, 48).convert("L").save(folder / "22.jpg")
    draw_image(23, 64, 48).convert("CMYK").save(folder / "23.jpg")
    draw_image(24, 64, 48).convert("RGBA").save(folder / "24.png")
    draw_image(25, 64, 48).save(folder / "25.webp")
    return folder


@pytest.fixture
def set_path(pictures: Path, tmp_path: Path) -> Path:
    """A set of its own for the test, of several small shards."""
    pack(pictures, tmp_path / "set", PackOptions(shard_bytes=16 << 10))
    return tmp_path / "set"


@pytest.fixture
def config(set_path: Path) -> Config:
    """Small crops, two global and two local views, micro-batches of 4."""
    return Config(
        run=RunConfig(seed=5),
        data=DataConfig(shards=str(set_path), micro_batch=4, window=2, lanes=4, decode_threads=1, reader_threads=1),
        crops=CropsConfig(global_size=64, local_size=32, local_count=2),
    )


def damage(set_path: Path, shard: int, sample: int, payload: bytes) -> None:
    """Overwrite an image in its tar, and make its checksum fit, so that only the decoder can notice."""
    import zlib

    shard_set = ShardSet.open(set_path)
    records = np.array(shard_set.records(shard))
    length = int(records[sample]["length"])
    payload = payload[:length].ljust(length, b"\0")
    with open(shard_set.tar_path(shard), "r+b") as tar:
        tar.seek(int(records[sample]["offset"]))
        tar.write(payload)
    records[sample]["crc32"] = zlib.crc32(payload)
    save_index(records, shard_set.index_path(shard))


@pytest.fixture
def damage_sample():
    """The function ``damage``, for tests that spoil their own set."""
    return damage
