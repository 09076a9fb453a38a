"""Every kind of damage is found and located."""

from __future__ import annotations

import json
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from drawn_images import drawn_image, encoded, overwrite, packed_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.format.pixels import RGB
from shards.format.records import UNREADABLE, load_index, save_index
from shards.format.set_manifest import SetManifest
from shards.format.statistics import StatisticsBuilder
from shards.packing.index_tars import index_tars
from shards.packing.statistics import add_image
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


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("label", 1, "has label 1, the tar has 0"),
        ("flags", UNREADABLE, "has a size of 34x26 for an unreadable image"),
        ("flags", 4, "has unknown flags 0x4"),
        ("crc32", 1, "wrong CRC-32"),
        ("width", 32, "another width or height"),
        ("height", 0, "index record is damaged"),
    ],
)
def test_each_wrong_field_of_an_index_is_reported(shard_set: ShardSet, field: str, value: int, reason: str) -> None:
    index = shard_set.index_path(0)
    records = np.array(load_index(index))
    records[field][1] = value
    save_index(records, index)
    faults = verify(shard_set.path)
    assert {fault.index for fault in faults} == {1} and reason in " ".join(map(str, faults))


def test_an_image_that_can_be_read_is_not_unreadable(shard_set: ShardSet) -> None:
    index = shard_set.index_path(0)
    records = np.array(load_index(index))
    records["flags"][1], records["width"][1], records["height"][1] = UNREADABLE, 0, 0
    save_index(records, index)
    assert [(fault.index, fault.reason) for fault in verify(shard_set.path)] == [
        (1, "has the flag of an unreadable image in the index")
    ]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("num_samples", 41, "num_samples is 41, the shards have 40 together"),
        ("num_bytes", None, "num_bytes is None"),
        ("fingerprint", "a source", "the fingerprint 'a source' is not"),
        ("classes", ["cat", "doh"], "a field was changed"),
        ("classes", ["cat"], "has label 1, the manifest has 1 classes"),
        ("checksum", 3, "a field was changed"),
        ("comment", "mine", "unknown field 'comment'"),
    ],
)
def test_each_wrong_field_of_a_manifest_is_reported(
    shard_set: ShardSet, field: str, value: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = shard_set.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert reason in "\n".join(map(str, verify(shard_set.path)))
    if not reason.startswith("has label"):
        ShardSet.open(shard_set.path)  # usable, with a warning
        assert reason in caplog.text


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return packed_set(tmp_path_factory.mktemp("small"), 3, ("cat", "dog"))


@pytest.mark.parametrize("name", ["manifest.json", "index/000000.npy", "index/000000.idx"])
@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_changed_bit_of_an_index_or_manifest_is_found(
    small_set: ShardSet, name: str, data: st.DataObject
) -> None:
    path, manifest = small_set.path / name, small_set.manifest
    whole = path.read_bytes()
    changed = bytearray(whole)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(changed)
        is_found = verify(small_set.path) != []
        assert is_found or (name == "manifest.json" and SetManifest.load(small_set.path) == manifest)
    except ShardError as error:
        assert "manifest.json" in str(error)
    finally:
        path.write_bytes(whole)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_changed_bit_of_an_index_without_checksums_is_found(small_set: ShardSet, data: st.DataObject) -> None:
    path, records = small_set.index_path(0), small_set.records(0)
    whole = path.read_bytes()
    try:
        with open(path, "wb") as file:
            np.save(file, records)
        changed = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(changed) - 1))
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert verify(small_set.path) != [] or np.array_equal(load_index(path), records)
    finally:
        path.write_bytes(whole)


def test_tiffs_that_are_read_by_windows_are_decoded_part_by_part(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, damaged in enumerate((False, True)):
            path = tmp_path / f"{number}.tif"
            tifffile.imwrite(path, values, tile=(64, 64), photometric="rgb", compression="zlib")
            if damaged:
                path.write_bytes(path.read_bytes()[:-400] + bytes(400))
            tar.add(path, path.name)
    index_tars([str(tmp_path / "x.tar")], tmp_path / "set")
    shard_set = ShardSet.open(tmp_path / "set")
    assert [fault.reason for fault in verify(shard_set.path, max_pixels=50_000)][-2:] == [
        "300x200 is more than 50000 pixels"
    ] * 2
    faults = verify(shard_set.path, max_pixels=50_000, windows=True)
    assert [(fault.index, "libdeflate" in fault.reason) for fault in faults if fault.index is not None] == [(1, True)]
    (fault,) = (each for each in verify(shard_set.path, max_pixels=64, windows=True) if each.index == 0)
    assert fault.reason == "its tiles or strips of 64x64 are more than 64 pixels"
    whole, parts = StatisticsBuilder(RGB), StatisticsBuilder(RGB)
    whole.add(values)
    with patch("shards.packing.statistics.DEFAULT_MAX_PIXELS", 50_000):
        for sample in (0, 1):
            with suppress(ShardError):
                add_image(parts, shard_set.read(0, sample))
    assert parts.result() == whole.result()
