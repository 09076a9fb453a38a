"""The lanes of a rank, the checks of ``data.cache``, and loading through a cache."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from drawn_images import packed_set
from faulty_server import FaultyServer, faulty_server
from hypothesis import given
from hypothesis import strategies as st

from shards.format.set_manifest import SetManifest
from shards.reading.order import Order
from shards.reading.shard_set import ShardSet
from streamtrain.config.load import build, open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader, micro_batch_slots
from streamtrain.data.stream import build_stream_order, check_cache, find_lanes
from streamtrain.errors import ConfigError


@given(
    st.builds(
        Order, st.lists(st.integers(1, 9), min_size=1, max_size=30), seed=st.integers(0, 9),
        window=st.integers(1, 3), lanes=st.integers(1, 9), lane_block=st.integers(1, 4),
    ),
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 300), st.data(),
)  # fmt: skip
def test_find_lanes_matches_the_slots_of_a_rank(
    order: Order, micro: int, world: int, accumulation: int, start: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    batch, share = micro * world * accumulation, micro * accumulation
    lanes = find_lanes(order, batch, start, range(share * rank, share * (rank + 1)))
    cycle = order.lane_cycle * accumulation
    slots = np.concatenate([*islice(micro_batch_slots(start, batch, micro, rank, world), cycle)])
    assert set(order.lanes_of(slots).tolist()) == lanes


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return packed_set(tmp_path_factory.mktemp("origin"), 60, shard_bytes=9_000)


@pytest.fixture
def server(origin: ShardSet, tmp_path: Path) -> Iterator[FaultyServer]:
    shutil.copytree(origin.path, tmp_path / "served" / "set")
    with faulty_server(tmp_path / "served") as running:
        yield running


def config_of(shards: str, folder: Path, limit: int | str) -> Config:
    data = {"shards": shards, "micro_batch": 4, "window": 2, "lanes": 4, "decode_threads": 1}
    data["cache"] = {"dir": str(folder), "limit": limit}
    crops = {"global_size": 32, "local_size": 16, "local_count": 1}
    return build({"data": data, "crops": crops, "run": {"seed": 5, "steps": 20}})


def check(config: Config, rank: int = 0, world_size: int = 1, local_world_size: int = 1) -> None:
    shard_set = open_shard_set(config)
    order = build_stream_order(config, shard_set, world_size)
    check_cache(config, shard_set, order, rank, world_size, local_world_size)


def test_a_limit_below_the_window_raises_with_the_required_bytes(
    origin: ShardSet, server: FaultyServer, tmp_path: Path
) -> None:
    sizes = sorted((entry.bytes for entry in origin.manifest.shards), reverse=True)
    url, needed = f"{server.url}/set", {}
    for ranks, local in ((1, 1), (2, 2), (2, 1)):
        with pytest.raises(ConfigError, match=r"data\.cache\.limit is 1000 bytes, but .* need \d+ \(") as raised:
            check(config_of(url, tmp_path / "cache", 1000), 0, ranks, local)
        match = re.search(r"need (\d+) ", str(raised.value))
        assert match
        needed[ranks, local] = int(match[1])
        check(config_of(url, tmp_path / "cache", match[1]), 0, ranks, local)
        with pytest.raises(ConfigError):
            check(config_of(url, tmp_path / "cache", int(match[1]) - 1), 0, ranks, local)
    # 4 lanes of 2 shards; with two ranks on two machines, each machine reads half of the lanes
    assert sum(sizes[:8]) < needed[1, 1] < needed[2, 2] < sum(sizes[:9]) and needed[2, 1] < 0.6 * needed[1, 1]
    assert not (tmp_path / "cache").exists()


def test_a_disk_too_small_for_the_limit_raises(server: FaultyServer, tmp_path: Path) -> None:
    manifest = SetManifest.load(server.root / "set")
    SetManifest(tuple(replace(shard, bytes=10**14) for shard in manifest.shards)).save(server.root / "set")
    with pytest.raises(ConfigError, match=r"data\.cache may use 1000000000000000 bytes, but its disk has"):
        check(config_of(f"{server.url}/set", tmp_path / "cache", "1000TB"))


def test_a_cache_of_a_local_set_raises(origin: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache has no effect: .*set is on this machine"):
        check(config_of(str(origin.path), tmp_path / "cache", "1GB"))


def test_batches_through_a_cache_match_local_ones_and_the_cache_closes(
    origin: ShardSet, server: FaultyServer, tmp_path: Path
) -> None:
    def load_crops(config: Config) -> list[bytes]:
        with Loader(open_shard_set(config), config, rank=0, world_size=1, device="cpu", end_slot=80) as loader:
            crops = [next(loader).global_crops.numpy().tobytes() for _ in range(20)]
            scalars.update(loader.scalars())
        return crops

    scalars: dict[str, float] = {}
    plain = build({**config_of("x", tmp_path, "1MB").model_dump(), "data": {
        "shards": str(origin.path), "micro_batch": 4, "window": 2, "lanes": 4, "decode_threads": 1,
    }})  # fmt: skip
    expected = load_crops(plain)
    assert not scalars
    assert load_crops(config_of(f"{server.url}/set", tmp_path / "cache", "1MB")) == expected
    assert scalars["data/downloaded_bytes"] >= origin.manifest.num_bytes and scalars["data/retries"] == 0
    assert 0 <= scalars["data/cache_hit_share"] <= 1
    # the cache now holds the whole set, so only the manifest is fetched
    assert load_crops(config_of(f"{server.url}/set", tmp_path / "cache", "1MB")) == expected
    assert scalars["data/downloaded_bytes"] < 10_000 and scalars["data/cache_hit_share"] == 1
    assert not list((tmp_path / "cache").glob("*.user"))
