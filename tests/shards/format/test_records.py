"""Index files: checksums find every changed bit, and files without checksums stay readable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.format.records import (
    NO_LABEL,
    RECORD,
    UNREADABLE,
    DamagedIndexError,
    Index,
    find_record_fault,
    load_index,
    open_bytes,
    save_index,
    sealed_bytes,
)

_COUNT = 2500  # three blocks


def _records(count: int) -> np.ndarray:
    content = np.random.default_rng(0).integers(0, 256, count * RECORD.itemsize, dtype=np.uint8).tobytes()
    return np.frombuffer(content, RECORD)


def _saved(count: int, path: Path) -> bytes:
    save_index(_records(count), path)
    return path.read_bytes()


def _first_record(content: bytes) -> int:
    return content.index(b"\n") + 1


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, _COUNT])
def test_index_file_round_trip(count: int, tmp_path: Path) -> None:
    content = _saved(count, tmp_path / "000000.npy")
    for records in (
        load_index(tmp_path / "000000.npy"),
        open_bytes(content, "x").records(),
        np.load(tmp_path / "000000.npy"),
    ):
        np.testing.assert_array_equal(records, _records(count))
    index = open_bytes(content, "x")
    assert len(index) == count and index.has_checksums
    assert [index.record(number) for number in range(count)] == list(_records(count))
    with pytest.raises(IndexError):
        index.record(count)


@pytest.mark.parametrize("count", [0, 1025])
def test_files_of_earlier_versions_are_readable(count: int, tmp_path: Path) -> None:
    path = tmp_path / "000000.npy"
    np.save(path, _records(count))
    np.testing.assert_array_equal(load_index(path), _records(count))
    assert not open_bytes(path.read_bytes(), "x").has_checksums


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "000000.npy"
    with pytest.raises(ShardError, match=r"000000\.npy is missing"):
        load_index(path)
    np.save(path, np.zeros(5))
    with pytest.raises(ShardError, match=r"000000\.npy was written by another version"):
        load_index(path)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_bit_is_found_wherever_it_is(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(_saved(5, tmp_path / "x.npy"))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ShardError, match="index x "):
        open_bytes(bytes(content), "x").records()


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_cut_is_found_unless_the_records_are_whole(tmp_path: Path, data: st.DataObject) -> None:
    content = _saved(5, tmp_path / "x.npy")
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    if len(cut) == _first_record(content) + 5 * RECORD.itemsize:
        np.testing.assert_array_equal(open_bytes(cut, "x").records(), _records(5))  # as earlier versions wrote it
        return
    with pytest.raises(ShardError, match="index x "):
        open_bytes(cut, "x").records()


def test_damage_to_a_block_leaves_the_others_readable(tmp_path: Path) -> None:
    content = bytearray(_saved(_COUNT, tmp_path / "x.npy"))
    content[_first_record(content) + 1500 * RECORD.itemsize] ^= 1
    index = open_bytes(bytes(content), "x")
    with pytest.raises(DamagedIndexError, match=r"records 1024 to 2047 of index x are damaged"):
        index.record(1500)
    for sound in (0, 1023, 2048, _COUNT - 1):
        assert index.record(sound) == _records(_COUNT)[sound]
    # a copy of the index does not make the damage valid
    sealed = index.to_bytes()
    assert len(sealed) == sealed_bytes(_COUNT)
    copied = Index.open_copy(lambda length, offset: sealed[offset : offset + length], "x", 0, _COUNT)
    assert copied.record(0) == _records(_COUNT)[0]
    with pytest.raises(DamagedIndexError):
        copied.record(1500)


def test_a_read_error_concerns_one_block(tmp_path: Path) -> None:
    content = _saved(_COUNT, tmp_path / "x.npy")

    def read(length: int, offset: int) -> bytes:
        if offset <= _first_record(content) + 1024 * RECORD.itemsize < offset + length:
            raise OSError(5, "Input/output error")
        return content[offset : offset + length]

    index = Index.open(read, len(content), "x")
    assert index.record(0) == _records(_COUNT)[0]
    with pytest.raises(DamagedIndexError, match="Input/output error"):
        index.record(1024)


def test_memory_for_blocks_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.format.records._Blocks._MAX_BLOCKS", 2)
    content, reads = _saved(_COUNT, tmp_path / "x.npy"), []

    def read(length: int, offset: int) -> bytes:
        reads.append(offset)
        return content[offset : offset + length]

    index = Index.open(read, len(content), "x")
    reads.clear()
    for number in (0, 1, 1024, 2048, 1024, 0):  # the first block is dropped for the third
        assert index.record(number) == _records(_COUNT)[number]
    assert len(reads) == 4


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("length", 2**30 + 1, "bytes at offset"),
        ("offset", 2**63, "bytes at offset"),
        ("flags", 2, "unknown flags"),
        ("width", 0, "0x8 pixels"),
        ("flags", UNREADABLE, "9x8 pixels with flags"),
        ("label", -2, "label -2"),
        ("label", 3, "label 3 of 3 classes"),
        ("label", NO_LABEL, None),
    ],
)
def test_impossible_records_are_described(field: str, value: int, fault: str | None) -> None:
    records = np.array([(512, 100, 0, 9, 8, 2, 0)], RECORD)
    assert find_record_fault(records[0], 10_000, 3) is None
    records[field] = value
    found = find_record_fault(records[0], 10_000, 3)
    assert found is None if fault is None else fault in str(found)
