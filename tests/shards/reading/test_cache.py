"""Shards are prefetched once, within the limit, and give the same images despite faults."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_images import drawn_image, encoded, packed_set
from faulty_server import FaultyServer, faulty_server
from PIL import Image
from watched_folder import watched

from shards.errors import ShardError
from shards.format.records import RECORD
from shards.format.set_manifest import SetManifest
from shards.packing.pack import PackOptions, pack
from shards.reading.cache import CachedShard, ShardCache, copy_bytes, min_cache_bytes
from shards.reading.ledger import Ledger
from shards.reading.mixture import AnySet, build_order, open_sets
from shards.reading.order import Window
from shards.reading.shard_set import ShardSet
from shards.reading.source import Source
from shards.storage.store import RetryPolicy

_ROOT = Path(__file__).resolve().parents[3]
_FAST_RETRIES = RetryPolicy(20.0, 1.5, 0.01, 0.05)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A set of 60 images in shards of a few."""
    return packed_set(tmp_path_factory.mktemp("origin"), 60, shard_bytes=12_000)


@pytest.fixture
def server(local: ShardSet, tmp_path: Path) -> Iterator[FaultyServer]:
    shutil.copytree(local.path, tmp_path / "served" / "set")
    with faulty_server(tmp_path / "served") as running:
        yield running


@contextmanager
def opened_cache(
    shard_set: AnySet, folder: Path, limit: int, windows: Iterator[Window], downloads: int = 3
) -> Iterator[ShardCache]:
    cache = ShardCache(
        Ledger(folder, limit), shard_set.remote_shard, windows, start_slot=0, horizon_slots=1000, downloads=downloads
    )
    try:
        yield cache
    finally:
        cache.close()


def stream(shard_set: AnySet, folder: Path | None = None, limit: int = 0, epochs: int = 2) -> list[tuple[int, bytes]]:
    """Return shards and payloads of the epochs in batches of 6, through a cache if a folder is given."""
    order = build_order(shard_set, seed=3, window=2, lanes=2, lane_block=3)
    end = epochs * shard_set.num_samples

    def read(readable: AnySet, on_read: Callable[[int], None] | None = None) -> list[tuple[int, bytes]]:
        source = Source(readable, order, threads=3, on_read=on_read)
        batches = list(source.batches(np.arange(at, at + 6) for at in range(0, end, 6)))
        source.close()
        return [
            (int(shard), payload.tobytes())
            for batch in batches
            for shard, payload in zip(batch.shards, batch.payloads, strict=True)
        ]

    if folder is None:
        return read(shard_set)
    windows = itertools.takewhile(lambda window: window.first_slot < end, order.windows(0, range(order.lanes)))
    with opened_cache(shard_set, folder, limit, windows) as cache:
        return read(shard_set.with_copies(cache), cache.mark_consumed)


def window_bytes(shard_set: ShardSet, shards: int) -> int:
    return min_cache_bytes(shard_set.manifest.shards, shards, processes=1)


def test_stream_equals_local_stream_within_the_limit_despite_faults(
    local: ShardSet, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = ShardSet.open(f"{server.url}/set", _FAST_RETRIES)
    faults = ["503", "cut", None, "short", "stall", None, "503", None, None, "whole", "cut", None, "short", None]
    server.faults = [*faults]
    limit = window_bytes(local, 5)
    with caplog.at_level(logging.WARNING, "shards.storage.store"), watched(tmp_path / "cache") as most:
        assert stream(remote, tmp_path / "cache", limit) == stream(local)
    assert window_bytes(local, 3) < most[0] <= limit
    assert not server.faults
    logged = [record for record in caplog.records if "attempt" in record.getMessage()]
    assert len(logged) >= sum(fault not in (None, "whole") for fault in faults)
    assert remote.traffic.num_retries == len(logged)
    assert remote.traffic.num_bytes >= local.manifest.num_bytes


def test_each_shard_is_fetched_once_if_all_fit(local: ShardSet, server: FaultyServer, tmp_path: Path) -> None:
    expected = stream(local)
    for _ in range(2):
        remote = ShardSet.open(f"{server.url}/set", _FAST_RETRIES)
        assert stream(remote, tmp_path / "cache", 10 * local.manifest.num_bytes) == expected
    gets = Counter(path for path, _ in server.gets)
    assert {gets[f"/set/shards/{shard.name}"] for shard in local.manifest.shards} == {1}
    assert gets["/set/manifest.json"] == 2


def test_evicted_shards_are_fetched_again(local: ShardSet, server: FaultyServer, tmp_path: Path) -> None:
    remote = ShardSet.open(f"{server.url}/set", _FAST_RETRIES)
    limit = window_bytes(local, 4)
    with watched(tmp_path / "cache") as most:
        assert stream(remote, tmp_path / "cache", limit) == stream(local)
    assert most[0] <= limit


def test_shards_with_one_name_in_two_sets_are_kept_apart(local: ShardSet, tmp_path: Path) -> None:
    served = tmp_path / "served"
    shutil.copytree(local.path, served / "a")
    for number in range(30):
        path = served / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(drawn_image(100 + number), "PNG"))
    pack(served / "images", served / "b", PackOptions(shard_bytes=20_000))
    shares = [("a", 2.0), ("b", 1.0)]
    with faulty_server(served) as server:
        near = open_sets([(str(served / name), weight) for name, weight in shares])
        far = open_sets([(f"{server.url}/{name}", weight) for name, weight in shares], _FAST_RETRIES)
        assert stream(far, tmp_path / "cache", 10**7) == stream(near)
        # the same URLs with other contents: old copies are not used
        shutil.rmtree(served / "a")
        shutil.copytree(served / "b", served / "a")
        near, far = ShardSet.open(served / "a"), ShardSet.open(f"{server.url}/a", _FAST_RETRIES)
        assert stream(far, tmp_path / "cache", 10**7) == stream(near)


def test_shard_that_differs_from_the_manifest_is_an_error(
    local: ShardSet, server: FaultyServer, tmp_path: Path
) -> None:
    tar = server.root / "set" / "shards" / "000002.tar"
    content = tar.read_bytes()
    for number, wrong in enumerate([content[:-1] + b"?", content[:5000], content + b"more"]):
        tar.write_bytes(wrong)
        remote = ShardSet.open(f"{server.url}/set", _FAST_RETRIES)
        if len(wrong) > len(content):
            # bytes after the expected end are not read
            assert stream(remote, tmp_path / f"cache{number}", 10**7) == stream(local)
            continue
        with pytest.raises(ShardError, match=r"/set/shards/000002\.tar (does not match|returned 5000 bytes)"):
            stream(remote, tmp_path / f"cache{number}", 10**7)
    server.gone.add("/set/shards/000002.tar")
    with pytest.raises(ShardError, match=r"/set/shards/000002\.tar does not exist"):
        stream(remote, tmp_path / "cache", 10**7)


def test_failed_prefetch_is_an_error_only_when_needed(server: FaultyServer, tmp_path: Path) -> None:
    remote = ShardSet.open(f"{server.url}/set", _FAST_RETRIES)
    server.gone.add("/set/shards/000001.tar")
    windows = [Window(0, 9, (0,)), Window(10, 19, (1,)), Window(20, 29, (2,))]
    with opened_cache(remote, tmp_path / "cache", 10**7, iter(windows)) as cache:
        assert isinstance(cache.get(0), CachedShard)
        assert isinstance(cache.get(2), CachedShard)
        with pytest.raises(ShardError, match=r"000001\.tar does not exist"):
            cache.get(1)
        server.gone.clear()
        assert isinstance(cache.get(1), CachedShard)


def test_prefetch_fills_the_folder_and_evicts_consumed_shards(
    local: ShardSet, server: FaultyServer, tmp_path: Path
) -> None:
    remote, folder = ShardSet.open(f"{server.url}/set", _FAST_RETRIES), tmp_path / "cache"
    windows = [Window(10 * shard, 10 * shard + 9, (shard,)) for shard in range(7)]
    limit = min_cache_bytes(local.manifest.shards, 3, 1)

    def num_cached() -> int:
        return len(list(folder.glob("*.shard")))

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 10
        while num_cached() < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert num_cached() == count

    with opened_cache(remote, folder, limit, iter(windows)) as cache:
        wait_for(3)
        open_copies = [cache.get(shard) for shard in range(3)]
        assert (cache.hits, cache.misses) == (3, 0)
        # the other shards are needed sooner, so shard 3 evicts none and is read from the store
        assert cache.get(3) is None
        assert cache.misses == 1
        del open_copies
        cache.mark_consumed(10)
        assert isinstance(cache.get(3), CachedShard)
        assert cache.get(0) is None  # evicted, and not planned any more
        cache.mark_consumed(80)
        assert cache.get(6) is None


@pytest.mark.parametrize("damage", ["image", "record", "checksum"])
def test_damaged_copy_is_replaced_by_the_original(
    damage: str, local: ShardSet, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote, folder = ShardSet.open(f"{server.url}/set", _FAST_RETRIES), tmp_path / "cache"
    with opened_cache(remote, folder, 10**7, iter([Window(0, 59, (0,))])) as cache:
        cached_set = remote.with_copies(cache)
        assert cached_set.read(0, 1) == local.read(0, 1)
        (copy,) = folder.glob("*.shard")
        entry = local.manifest.shards[0]
        place = {
            "image": int(local.record(0, 2)["offset"]) + 20,
            "record": entry.bytes + 2 * RECORD.itemsize,
            "checksum": copy.stat().st_size - 4,
        }[damage]
        with open(copy, "r+b") as file:
            file.seek(place)
            file.write(b"XXXX")
        if damage != "image":  # otherwise the records are in memory
            cached_set._copies._open.clear()
        with caplog.at_level(logging.WARNING, "shards.reading.shard_set"):
            assert cached_set.read(0, 2) == local.read(0, 2)
        assert "dropping the cached copy" in caplog.text
        deadline = time.monotonic() + 10
        while cached_set.read(0, 2) == local.read(0, 2) and not copy.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        caplog.clear()
        assert cached_set.read(0, 2) == local.read(0, 2) and not caplog.text  # the copy is complete again
        assert cached_set.key(0, 2) == local.key(0, 2)
        np.testing.assert_array_equal(cached_set.records(0), local.records(0))


_ONE_SHARD = """
import resource, sys
from pathlib import Path
from shards.reading.cache import ShardCache
from shards.reading.ledger import Ledger
from shards.reading.order import Window
from shards.reading.shard_set import ShardSet
from shards.storage.store import RetryPolicy
url, folder, largest = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
remote = ShardSet.open(url, RetryPolicy(60.0, 20.0, 0.01, 0.05))
if largest:
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
ledger = Ledger(folder, 10**8)
cache = ShardCache(ledger, remote.remote_shard, iter([Window(0, 9, (0,))]), start_slot=0, horizon_slots=9, downloads=1)
print(len(cache.get(0).read(10**9, 0)))
cache.close()
"""


def one_shard(server: FaultyServer, folder: Path, largest: int = 0) -> subprocess.Popen[str]:
    """Start a process that opens the first shard of the set with a cache."""
    words = [sys.executable, "-c", _ONE_SHARD, f"{server.url}/set", str(folder), str(largest)]
    return subprocess.Popen(words, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_full_disk_is_an_error(server: FaultyServer, tmp_path: Path) -> None:
    child = one_shard(server, tmp_path / "cache", largest=4000)
    _, errors = child.communicate(timeout=60)
    message = errors.strip().splitlines()[-1]
    assert "ShardError: the cache folder" in message and "000000.tar (File too large); free space there" in message
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_download_resumes_after_a_kill_and_is_shared_by_processes(local: ShardSet, tmp_path: Path) -> None:
    # a shard of three pieces
    big = tmp_path / "served" / "set"
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 300, 400, 3), np.uint8)
    for number, pixels in enumerate(noise):
        (tmp_path / "images" / f"{number:02d}.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    pack(tmp_path / "images", big, PackOptions(shard_bytes=1 << 30))
    (entry,) = ShardSet.open(big).manifest.shards
    assert entry.bytes > 12 << 20
    folder, path = tmp_path / "cache", f"/set/shards/{entry.name}"
    with faulty_server(tmp_path / "served") as server:
        server.faults = [None, None, None, None, "stall"]  # manifest, index, two pieces of the tar, and the third
        child = one_shard(server, folder)
        deadline = time.monotonic() + 30
        while sum(requested == path for requested, _ in server.gets) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        (partial,) = folder.glob("*.partial")
        assert partial.stat().st_size == 8 << 20
        assert partial.name.endswith(f".{copy_bytes(entry)}.partial")

        server.gets.clear()
        others = [one_shard(server, folder) for _ in range(2)]
        outputs = [other.communicate(timeout=60) for other in others]
        assert [out.strip() for out, _ in outputs] == [str(entry.bytes)] * 2, outputs
        # the remaining pieces were fetched once, for both
        assert Counter(requested for requested, _ in server.gets)[path] == -(-entry.bytes // (4 << 20)) - 2
    assert sorted(name.rpartition(".")[2] for name in os.listdir(folder)) == ["lock", "shard"]


def test_closing_ends_waiting_readers(server: FaultyServer, tmp_path: Path) -> None:
    remote = ShardSet.open(f"{server.url}/set", RetryPolicy(60.0, 20.0, 20.0, 20.0))
    server.faults = ["503"] * 100
    with opened_cache(remote, tmp_path / "cache", 10**7, iter([Window(0, 9, (0,))]), downloads=1) as cache:
        threading.Timer(0.3, cache.close).start()
        with pytest.raises(ShardError, match="the cache is closed"):
            cache.get(0)
    assert not list((tmp_path / "cache").glob("*.user"))


def test_without_a_cache_each_index_is_read_once(tmp_path: Path) -> None:
    one = packed_set(tmp_path, 4)
    (entry,) = one.manifest.shards
    shards = [replace(entry, name=f"{number:06d}.tar") for number in range(210)]
    for shard in shards[1:]:
        shutil.copy(one.index_path(0), one.path / "index" / shard.index_name)
    SetManifest(tuple(shards)).save(one.path)
    with faulty_server(tmp_path) as server:
        remote = ShardSet.open(f"{server.url}/set", _FAST_RETRIES)
        for _ in range(2):
            for shard in range(210):
                assert remote.record(shard, 0) == one.record(0, 0)
        gets = Counter(path for path, _ in server.gets)
    assert len(gets) == 211 and set(gets.values()) == {1}
