"""Times follow the assumed rates, and the images of a set follow its index."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_images import packed_set

from shards.packing.index_tars import index_tars
from shards.reading.shard_set import ShardSet
from streamtrain.config.load import load_config
from streamtrain.planning.images import configured_images, stored_images
from streamtrain.planning.machine import CORE_FLOPS, Machine, core_flops
from streamtrain.planning.sizes import StoredImages


def test_rates_follow_the_features_in_use() -> None:
    amx = frozenset(CORE_FLOPS) - {"none"}
    assert core_flops(True, amx, True) == CORE_FLOPS["amx_bf16"][0]
    # fp32 uses no bf16 instructions
    assert core_flops(False, amx, True) == CORE_FLOPS["avx512"][0]
    assert core_flops(True, {"avx2"}, False) == CORE_FLOPS["avx2"][1]
    assert core_flops(False, frozenset(), False) == CORE_FLOPS["none"][1]


def test_a_step_takes_half_the_time_with_twice_the_cores_and_rate() -> None:
    config = load_config("vits16.yaml")
    slow = Machine(1, on_gpu=False, flops=1e11, cores=1)
    fast = replace(slow, flops=2e11, cores=2)
    times = [machine.estimate_step(config, machine.plan(config)).seconds for machine in (slow, fast)]
    assert times[0] == pytest.approx(2 * times[1], rel=0.02)
    assert times[0] > slow.plan(config).flops_per_step / 1e11


def test_images_of_a_set_are_measured(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, 20)
    measured = stored_images(shard_set)
    assert measured is not None
    records = [record for shard in range(shard_set.num_shards) for record in shard_set.records(shard)]
    assert measured.pixels == sum(int(r["width"]) * int(r["height"]) for r in records) // len(records)
    config = load_config("vits16.yaml", (f"data.shards={shard_set.path}",))
    assert configured_images(config) == measured
    absent = load_config("vits16.yaml", (f"data.shards={tmp_path}/absent",))
    assert configured_images(absent) is None


def test_windows_of_large_tiffs_are_small_images(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", np.zeros((300, 50, 3), np.uint8), tile=(16, 16), photometric="rgb")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x.tif", "x.tif")
    index_tars([str(tmp_path / "x.tar")], tmp_path / "set")
    shard_set = ShardSet.open(tmp_path / "set")
    found = [stored_images(shard_set, window) for window in (None, 100, 300)]
    assert [images.pixels for images in found if images] == [15_000, 5_000, 15_000]


def test_large_images_need_memory_to_decode() -> None:
    config = load_config("vits16.yaml")
    small, large = (
        Machine(1, on_gpu=False, images=StoredImages(pixels, pixels // 4)).plan(config).rank_bytes
        for pixels in (200_000, 12_000_000)
    )
    # three batches of decoded images, and the encoded ones up to their limit
    assert large - small > 3 * 16 * 3 * 11_800_000
