"""A damaged or wrong index: its images are replaced, and neither a start nor a later one ends with an exception."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from drawn_images import packed_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.errors import SampleError, ShardError
from shards.format.records import RECORD, load_index, save_index
from shards.reading import local_files
from shards.reading.mixture import JoinedSet
from shards.reading.order import Order
from shards.reading.quarantine import Quarantine
from shards.reading.shard_set import DAMAGED_LABEL, ShardSet
from shards.reading.source import Samples, Source
from streamtrain.evaluation.images import images_of_set

_COUNT = 60


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return packed_set(tmp_path_factory.mktemp("set"), _COUNT, ("cat", "dog"))


def _epoch(path: Path, log: Path | None = None) -> list[Samples]:
    opened = ShardSet.open(path)
    quarantine = Quarantine(log, max_rate=1.0)
    source = Source(opened, Order(opened.sizes, seed=1, window=2, lanes=2), threads=2, quarantine=quarantine)
    try:
        return list(source.batches(np.arange(at, at + 10) for at in range(0, _COUNT, 10)))
    finally:
        source.close()


def _contents(batches: list[Samples]) -> list[tuple[bytes, list[int], int]]:
    return [
        (payload.tobytes(), size.tolist(), int(label))
        for batch in batches
        for payload, size, label in zip(batch.payloads, batch.sizes, batch.labels, strict=True)
    ]


def _save_old(records: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, records)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("save", [save_index, _save_old], ids=["with checksums", "of an earlier version"])
def test_a_wrong_record_is_replaced_or_harmless(shard_set: ShardSet, save: object, data: st.DataObject) -> None:
    """Every image that is read is one of the set with its own size and an existing label."""
    path = shard_set.index_path(0)
    whole, sound = path.read_bytes(), np.array(load_index(path))
    records = np.array(sound)
    known = {content[0]: content for content in _contents(_epoch(shard_set.path))}
    row, bit = data.draw(st.integers(0, len(records) - 1)), data.draw(st.integers(0, 8 * RECORD.itemsize - 1))
    records.view(np.uint8)[row * RECORD.itemsize + bit // 8] ^= 1 << bit % 8
    is_label = records["label"][row] != sound["label"][row]
    try:
        save(records, path)  # type: ignore[operator]
        for payload, size, label in _contents(_epoch(shard_set.path)):
            assert size == known[payload][1]
            assert label == known[payload][2] or (is_label and label in (0, 1))
    finally:
        path.write_bytes(whole)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_bit_in_a_file_is_an_error_or_replaced(shard_set: ShardSet, data: st.DataObject) -> None:
    path = shard_set.index_path(1)
    whole = path.read_bytes()
    changed = bytearray(whole)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    known = {content[0]: content for content in _contents(_epoch(shard_set.path))}
    try:
        path.write_bytes(changed)
        assert all(content == known[content[0]] for content in _contents(_epoch(shard_set.path)))
    except ShardError as error:
        assert "index" in str(error) and "\n" not in str(error)
    finally:
        path.write_bytes(whole)


def test_unusable_records_are_logged_and_a_second_start_is_the_same(shard_set: ShardSet, tmp_path: Path) -> None:
    path = shard_set.index_path(0)
    whole, records = path.read_bytes(), np.array(load_index(path))
    records["width"][1] ^= 1 << 15
    records["height"][2] = records["width"][2] = 0
    records["label"][3] ^= 1 << 30
    try:
        save_index(records, path)
        first = _contents(_epoch(shard_set.path, tmp_path / "quarantine.jsonl"))
        log = (tmp_path / "quarantine.jsonl").read_text()
        assert {line.count("index") >= 1 and '"stage": "read"' in line for line in log.splitlines()} == {True}
        for reason in ("the index has", "its index record is damaged: 0x0 pixels", "its index record is damaged: lab"):
            assert reason in log
        assert _contents(_epoch(shard_set.path, tmp_path / "quarantine.jsonl")) == first
        assert (tmp_path / "quarantine.jsonl").read_text() == log
    finally:
        path.write_bytes(whole)


def test_an_old_index_is_checked_against_the_headers_of_the_tar(shard_set: ShardSet) -> None:
    path, tar = shard_set.index_path(0), shard_set.tar_path(0)
    whole, content = path.read_bytes(), tar.read_bytes()
    records = np.array(load_index(path))
    start = int(records["offset"][1])
    try:
        tar.write_bytes(content[: start - 300] + b"\xff" + content[start - 299 :])
        expected = ShardSet.open(shard_set.path).read(0, 1)  # the checksums of the index are enough
        assert expected == content[start : start + int(records["length"][1])]
        _save_old(records, path)
        opened = ShardSet.open(shard_set.path)
        with pytest.raises(SampleError, match="the header before it in the tar is damaged"):
            opened.read(0, 1)
        assert opened.read(0, 2)
    finally:
        path.write_bytes(whole)
        tar.write_bytes(content)


def test_labels_that_cannot_be_right_are_told_apart(shard_set: ShardSet) -> None:
    path = shard_set.index_path(0)
    whole, records = path.read_bytes(), np.array(load_index(path))
    expected = records["label"][:4].astype(np.int64)
    records["label"][1:3] = 2, -5
    damaged = bytearray(whole)
    damaged[whole.index(b"\n") + 5] ^= 1
    try:
        save_index(records, path)
        labels = ShardSet.open(shard_set.path).labels(0, np.arange(4))
        assert labels.tolist() == [expected[0], DAMAGED_LABEL, DAMAGED_LABEL, expected[3]]
        path.write_bytes(damaged)
        assert ShardSet.open(shard_set.path).labels(0, np.arange(4)).tolist() == [DAMAGED_LABEL] * 4
        sampled = images_of_set(ShardSet.open(shard_set.path), np.arange(0, _COUNT, 2))
        assert 0 < len(sampled) < _COUNT // 2 and set(sampled.labels.tolist()) == {0, 1}
        assert all(sampled.read(number)[0] for number in range(len(sampled)))
    finally:
        path.write_bytes(whole)


def test_errors_of_a_mixture_name_the_member(shard_set: ShardSet) -> None:
    path = shard_set.index_path(0)
    whole = bytearray(path.read_bytes())
    changed = bytearray(whole)
    changed[whole.index(b"\n") + 5] ^= 1
    try:
        path.write_bytes(changed)
        joined = JoinedSet([ShardSet.open(shard_set.path), ShardSet.open(shard_set.path)], [1.0, 1.0])
        with pytest.raises(SampleError, match=r"shard 1/000000\.tar, sample 0 .*are damaged \(wrong CRC-32\)"):
            joined.record(shard_set.num_shards, 0)
        assert joined.key(shard_set.num_shards, 0) == ""
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EMFILE])
def test_a_failing_source_ends_the_stream_and_blames_no_image(
    code: int, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, log = ShardSet.open(shard_set.path), tmp_path / "quarantine.jsonl"
    source = Source(opened, Order(opened.sizes, seed=1), threads=2, quarantine=Quarantine(log))
    batches = source.batches(np.arange(at, at + 10) for at in range(0, 10 * _COUNT, 10))
    next(batches)

    def fail(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local_files, "_PAUSES", (0.0,))
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ShardError, match=rf"\.tar cannot be read \({os.strerror(code)}.*re-run to resume$") as caught:
        list(batches)
    assert not isinstance(caught.value, SampleError) and not log.exists()
    source.close()


@pytest.mark.parametrize("save", [save_index, _save_old])
def test_a_size_without_its_orientation_is_corrected(shard_set: ShardSet, save: object) -> None:
    expected = sorted(_contents(_epoch(shard_set.path)))
    path = shard_set.index_path(0)
    whole, records = path.read_bytes(), np.array(load_index(path))
    records["width"], records["height"] = records["height"].copy(), records["width"].copy()
    try:
        save(records, path)  # type: ignore[operator]
        assert sorted(_contents(_epoch(shard_set.path))) == expected
    finally:
        path.write_bytes(whole)


def test_an_index_truncated_while_it_is_read_is_an_error(shard_set: ShardSet) -> None:
    path = shard_set.index_path(0)
    whole = path.read_bytes()
    opened = ShardSet.open(shard_set.path)
    assert opened.read(0, 0)
    try:
        path.write_bytes(b"")
        assert opened.read(0, 1)  # in memory
        with pytest.raises(ShardError, match="was truncated while it was in use"):
            opened.records(0)
        with pytest.raises(ShardError, match="is truncated; copy the set again"):
            ShardSet.open(shard_set.path)
    finally:
        path.write_bytes(whole)
