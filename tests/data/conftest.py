"""Small shard sets of generated images."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn_images import drawn_image, overwrite

from shards.format.records import save_index
from shards.packing.pack import PackOptions, pack
from shards.reading.shard_set import ShardSet
from streamtrain.config.crops import CropsConfig
from streamtrain.config.data import DataConfig
from streamtrain.config.run import RunConfig
from streamtrain.config.tree import Config


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 26 images of many sizes: 22 RGB JPEGs, one grey and one CMYK JPEG, a PNG with alpha, a WebP."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(22):
        drawn_image(number, 40 + 7 * number, 90 - 2 * number).save(folder / f"{number:02}.jpg", quality=90)
    drawn_image(22, 64, 48).convert("L").save(folder / "22.jpg")
    drawn_image(23, 64, 48).convert("CMYK").save(folder / "23.jpg")
    drawn_image(24, 64, 48).convert("RGBA").save(folder / "24.png")
    drawn_image(25, 64, 48).save(folder / "25.webp")
    return folder


@pytest.fixture
def set_path(pictures: Path, tmp_path: Path) -> Path:
    """A shard set of several small shards, private to the test."""
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


@pytest.fixture
def damage_sample():
    """A function that overwrites an image and updates its checksum, so that only the decoder can detect it."""

    def damage(set_path: Path, shard: int, sample: int, payload: bytes) -> None:
        shard_set = ShardSet.open(set_path)
        records = np.array(shard_set.records(shard))
        length = int(records[sample]["length"])
        payload = payload[:length].ljust(length, b"\0")
        overwrite(shard_set, shard, sample, payload)
        records[sample]["crc32"] = zlib.crc32(payload)
        save_index(records, shard_set.index_path(shard))

    return damage
