"""Sources return the packed bytes of each slot, in order, in bounded memory."""

from __future__ import annotations

import gc
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from drawn_images import overwrite, packed_set

from shards.errors import SampleError, ShardError
from shards.reading.mixture import JoinedSet
from shards.reading.order import Order
from shards.reading.shard_set import ShardSet
from shards.reading.source import Source


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return packed_set(tmp_path_factory.mktemp("source"), 60, ("cat", "dog"))


def test_epoch_returns_every_packed_image(shard_set: ShardSet) -> None:
    images = shard_set.path.parent / "images"
    packed = {path.read_bytes(): path.parent.name for path in images.rglob("*.jpg")}
    assert len(shard_set.manifest.shards) > 2
    source = Source(shard_set, Order(shard_set.sizes, seed=1, window=2, lanes=4), threads=2)
    seen = []
    for batch in source.batches(np.arange(first, first + 12) for first in range(0, 60, 12)):
        assert batch.sizes.dtype == batch.labels.dtype == np.int32
        for payload, size, label, shard, sample in zip(
            batch.payloads, batch.sizes, batch.labels, batch.shards, batch.samples, strict=True
        ):
            assert payload.dtype == np.uint8
            seen.append(payload.tobytes())
            assert shard_set.manifest.classes[label] == packed[payload.tobytes()]
            record = shard_set.record(int(shard), int(sample))
            assert (record["width"], record["height"]) == tuple(size)
            assert shard_set.read(int(shard), int(sample)) == payload.tobytes()
    source.close()
    assert sorted(seen) == sorted(packed)


def test_batches_keep_their_order_and_equal_those_read_alone(shard_set: ShardSet) -> None:
    source = Source(shard_set, Order(shard_set.sizes, seed=1), threads=3)
    lists = [np.arange(start, start + 5) for start in (40, 0, 1000, 55)]
    batches = list(source.batches(lists))
    assert [batch.slots.tolist() for batch in batches] == [slots.tolist() for slots in lists]
    for batch in batches:
        again = next(source.batches([batch.slots]))
        assert [payload.tobytes() for payload in again.payloads] == [payload.tobytes() for payload in batch.payloads]
    source.close()


@pytest.mark.parametrize("limit", [1, 3000, 10**6])
def test_bytes_in_flight_stay_below_the_limit(shard_set: ShardSet, limit: int) -> None:
    held, most, lock = [0], [0], threading.Lock()

    class Watched(ShardSet):
        def read(self, shard: int, sample: int) -> bytes:
            payload = super().read(shard, sample)
            with lock:
                held[0] += len(payload)
                most[0] = max(most[0], held[0])
            return payload

    watched = Watched(shard_set.path, shard_set.manifest)
    source = Source(watched, Order(shard_set.sizes, seed=1), threads=3, max_bytes_in_flight=limit)
    largest = 0
    for batch in source.batches(np.arange(first, first + 3) for first in range(0, 120, 3)):
        batch_bytes = sum(map(len, batch.payloads))
        largest = max(largest, batch_bytes)
        with lock:
            held[0] -= batch_bytes
    source.close()
    assert most[0] <= max(limit, largest)


def test_closing_an_endless_stream_stops_its_threads(shard_set: ShardSet) -> None:
    def endless() -> Iterator[np.ndarray]:
        start = 0
        while True:
            yield np.arange(start, start + 4)
            start += 4

    before = set(threading.enumerate())
    source = Source(shard_set, Order(shard_set.sizes, seed=1), threads=2)
    stream = source.batches(endless())
    assert next(stream).slots.tolist() == [0, 1, 2, 3]
    stream.close()
    source.close()
    assert set(threading.enumerate()) <= before


def test_changed_payload_is_named(shard_set: ShardSet, tmp_path: Path) -> None:
    damaged = ShardSet.open(shutil.copytree(shard_set.path, tmp_path / "set"))
    overwrite(damaged, 1, 2, bytes([shard_set.read(1, 2)[200] ^ 1]), skip=200)
    with pytest.raises(SampleError, match=r"000001\.tar, sample 2 \(key '\d+_.*image.*CRC") as caught:
        damaged.read(1, 2)
    assert caught.value.key == shard_set.key(1, 2)
    source = Source(damaged, Order(damaged.sizes, seed=1), threads=2)
    with pytest.raises(SampleError, match=r"000001\.tar, sample 2 "):
        list(source.batches([np.arange(60)]))
    source.close()


def test_errors_of_missing_and_truncated_files(shard_set: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no shard set at .*streamtrain pack"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"000000\.tar is a file, not a shard set"):
        ShardSet.open(shard_set.tar_path(0))
    with pytest.raises(ShardError, match=r"has tars but no manifest\.json; index them: streamtrain index"):
        ShardSet.open(shard_set.path / "shards")
    path = shutil.copytree(shard_set.path, tmp_path / "set")
    (path / "manifest.json").rename(path / "aside")
    with pytest.raises(ShardError, match=r"not a shard set: it has no manifest\.json"):
        ShardSet.open(path)
    (path / "aside").rename(path / "manifest.json")

    tar, index = path / "shards" / "000001.tar", path / "index" / "000001.npy"
    for file, fault in [(tar, "instead of"), (index, "truncated|damaged")]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ShardError, match=f"{file.name} .*({fault})"):
            ShardSet.open(path).records(1)
        file.unlink()
        with pytest.raises(ShardError, match=f"{file.name} is missing"):
            ShardSet.open(path)
        file.write_bytes(whole)

    manifest = path / "manifest.json"
    text = manifest.read_text()
    for broken, fault in [
        (text[:50], "cannot be read"),
        (text.replace('"version": 1', '"version": 99'), "version 99"),
        (text.replace('"samples"', '"count"', 1), "misses a field"),
        (text.replace('"name": "000001', '"name": "000002', 1), "was edited"),
    ]:
        manifest.write_text(broken)
        with pytest.raises(ShardError, match=fault):
            ShardSet.open(path)


def test_open_files_of_all_sets_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [packed_set(tmp_path / name, 40, shard_bytes=1) for name in "abc"]
    limit = 120
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, 4096))
    joined = JoinedSet(sets, [1.0, 1.0, 1.0])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for shard in range(joined.num_shards):
        assert joined.read(shard, 0)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= limit // 2
    del sets, joined
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
