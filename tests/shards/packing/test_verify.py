"""Every kind of damage is found and located."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn_images import drawn_image, encoded, overwrite, packed_set

from shards.format.index import load_index, save_index
from shards.packing.verify import verify
from shards.reading.shard_set import ShardSet


@pytest.fixture
def shard_set(tmp_path: Path) -> ShardSet:
    shard_set = packed_set(tmp_path, 40, ("cat", "dog"))
    assert verify(shard_set.path) == []
    return shard_set


def test_changed_images_are_reported(shard_set: ShardSet) -> None:
    length = int(shard_set.record(1, 2)["length"])
    overwrite(shard_set, 0, 1, b"text in place of an image")
    overwrite(shard_set, 1, 2, bytes(length))
    for workers in (1, 2):
        faults = verify(shard_set.path, workers=workers)
        assert [(fault.file, fault.index) for fault in faults] == [
            ("shards/000000.tar", None),
            ("shards/000000.tar", 1),
            ("shards/000001.tar", None),
            ("shards/000001.tar", 2),
        ]
        assert faults[1].key == shard_set.key(0, 1)


def test_images_damaged_before_indexing_are_found_by_decoding(shard_set: ShardSet) -> None:
    length = int(shard_set.record(0, 3)["length"])
    overwrite(shard_set, 0, 3, encoded(drawn_image(1, 300, 300))[:length])
    index = shard_set.index_path(0)
    records = np.array(load_index(index))
    records["crc32"][3] = zlib.crc32(shard_set.tar_path(0).read_bytes()[records["offset"][3] :][:length])
    save_index(records, index)
    faults = verify(shard_set.path)
    assert [(fault.file, fault.index) for fault in faults] == [("shards/000000.tar", None), ("shards/000000.tar", 3)]
    assert "truncated" in faults[1].reason


def test_damaged_files_are_reported(shard_set: ShardSet) -> None:
    path = shard_set.path
    tar = path / "shards" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:10_000])
    (path / "index" / "000001.npy").unlink()
    with open(path / "index" / "000001.idx", "a") as index:
        index.write("jpg 1 2 three\n")
    (path / "shards" / "left_over.tar").write_bytes(b"")
    found = {(fault.file, fault.reason.split(" ")[0]) for fault in verify(path) if fault.index is None}
    assert found == {
        ("shards/000000.tar", "has"),
        ("shards/000000.tar", "its"),
        ("shards/000000.tar", "shards/000000.tar"),
        ("index/000001.npy", "index"),
        ("index/000001.idx", "does"),
        ("shards/left_over.tar", "the"),
    }


def test_wrong_offset_in_index_is_reported(shard_set: ShardSet) -> None:
    index = shard_set.index_path(0)
    records = np.array(load_index(index))
    records["offset"][1] += 512
    save_index(records, index)
    assert ("index/000000.npy", 1) in [(fault.file, fault.index) for fault in verify(shard_set.path)]
