"""Unusable samples are logged and replaced depending only on the slot; too many are an error."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from drawn_images import overwrite, packed_set
from faulty_server import faulty_server
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import SampleError, ShardError
from shards.format import append_log
from shards.reading.order import Order
from shards.reading.quarantine import Entry, Quarantine
from shards.reading.shard_set import ShardSet
from shards.reading.source import Samples, Source
from shards.storage.store import RetryPolicy

_COUNT = 120


@pytest.fixture
def damaged(tmp_path: Path) -> ShardSet:
    """A set with damage in samples 1 and 4 of the first shard and sample 2 of the third."""
    shard_set = packed_set(tmp_path, _COUNT)
    for shard, sample in ((0, 1), (0, 4), (2, 2)):
        overwrite(shard_set, shard, sample, b"damage", skip=50)
    return shard_set


def _epoch(shard_set: ShardSet, quarantine: Quarantine, batch: int = 10, first: int = 0) -> list[Samples]:
    source = Source(shard_set, Order(shard_set.sizes, seed=1, window=2, lanes=4), threads=2, quarantine=quarantine)
    batches = list(source.batches(np.arange(at, at + batch) for at in range(first, _COUNT, batch)))
    source.close()
    return batches


def _sequence(batches: list[Samples]) -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch.shards.tolist(), batch.samples.tolist(), strict=True)]


def _log(path: Path) -> list[Entry]:
    return [Entry(**json.loads(line)) for line in path.read_text().splitlines()]


def test_exactly_the_changed_samples_are_logged_and_replaced(damaged: ShardSet, tmp_path: Path) -> None:
    log = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(log)
    batches = _epoch(damaged, quarantine)
    entries = _log(log)
    bad = {("000000.tar", 1), ("000000.tar", 4), ("000002.tar", 2)}
    assert {(entry.shard, entry.index) for entry in entries} == bad
    assert quarantine.num_entries >= len(entries) >= 3
    assert all("CRC" in entry.reason and entry.stage == "read" and entry.key for entry in entries)
    assert sum(len(batch.slots) for batch in batches) == _COUNT
    assert not {(damaged.name(shard), sample) for shard, sample in _sequence(batches)} & bad
    for batch in batches:
        for row, payload in enumerate(batch.payloads):
            assert payload.tobytes() == damaged.read(int(batch.shards[row]), int(batch.samples[row]))
    untouched = [pair for slot, pair in enumerate(_sequence(batches)) if slot not in {entry.slot for entry in entries}]
    assert len(set(untouched)) == len(untouched) == _COUNT - len({entry.slot for entry in entries})


def test_substitutes_do_not_depend_on_batch_size_or_resume(damaged: ShardSet, tmp_path: Path) -> None:
    log = tmp_path / "quarantine.jsonl"
    expected = _sequence(_epoch(damaged, Quarantine(log)))
    written = log.read_bytes()
    assert _sequence(_epoch(damaged, Quarantine(), batch=3)) == expected
    assert _sequence(_epoch(damaged, Quarantine(log), batch=40, first=40)) == expected[40:]
    assert log.read_bytes() == written  # known samples are not logged again


def test_failed_read_stays_replaced_at_its_slot(damaged: ShardSet, tmp_path: Path) -> None:
    log = tmp_path / "quarantine.jsonl"
    expected = _sequence(_epoch(damaged, Quarantine(log)))
    intact = packed_set(tmp_path / "again", _COUNT)
    assert intact.digest == damaged.digest
    assert _sequence(_epoch(intact, Quarantine(log))) == expected
    assert _sequence(_epoch(intact, Quarantine())) != expected


def test_undecodable_images_are_replaced_everywhere(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, _COUNT)
    log = tmp_path / "quarantine.jsonl"
    order = Order(shard_set.sizes, seed=1)
    source = Source(shard_set, order, threads=1, quarantine=Quarantine(log))
    batch = next(source.batches([np.arange(8)]))
    replaced = source.replace(batch, 3, "the decoder said no")
    assert replaced.slots is batch.slots
    keep = np.arange(8) != 3
    assert (replaced.samples[keep] == batch.samples[keep]).all()
    original = (batch.shards[3], batch.samples[3])
    assert (replaced.shards[3], replaced.samples[3]) != original
    assert replaced.payloads[3].tobytes() == shard_set.read(int(replaced.shards[3]), int(replaced.samples[3]))
    assert _sequence([next(source.batches([np.arange(8)]))]) == _sequence([replaced]) == source.locate(np.arange(8))
    later = next(source.batches([np.arange(_COUNT, 2 * _COUNT)]))
    assert original not in _sequence([later])
    source.close()
    assert [(entry.slot, entry.stage, entry.reason) for entry in _log(log)] == [(3, "decode", "the decoder said no")]

    strict = Source(shard_set, order, threads=1)
    with pytest.raises(SampleError, match="the decoder said no"):
        strict.replace(next(strict.batches([np.arange(8)])), 3, "the decoder said no")
    strict.close()


def test_images_above_max_pixels_are_replaced(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, _COUNT)
    quarantine = Quarantine(max_rate=1.0)
    source = Source(shard_set, Order(shard_set.sizes, seed=1), threads=2, quarantine=quarantine, max_pixels=1000)
    batch = next(source.batches([np.arange(60)]))
    assert (batch.sizes.prod(axis=1) <= 1000).all()
    assert quarantine.num_entries > 0
    source.close()


def test_missing_local_shard_stops_the_reader(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, _COUNT)
    shard_set.tar_path(1).unlink()
    quarantine = Quarantine(max_rate=1.0)
    with pytest.raises(ShardError, match=r"000001\.tar is gone; restore it"):
        _epoch(shard_set, quarantine)
    assert quarantine.num_entries == 0


def test_too_many_unusable_images_are_an_error(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, _COUNT)
    for shard in range(1, len(shard_set.sizes)):
        shard_set.tar_path(shard).write_bytes(bytes(shard_set.tar_path(shard).stat().st_size))
    log = tmp_path / "quarantine.jsonl"
    with pytest.raises(ShardError, match=r"unusable images in .* far above .* 0\.01; .* latest: .*quarantine\.jsonl"):
        _epoch(shard_set, Quarantine(log))
    shard_set.tar_path(0).write_bytes(bytes(shard_set.tar_path(0).stat().st_size))
    with pytest.raises(ShardError, match="100 images in a row are unusable"):
        _epoch(shard_set, Quarantine(max_rate=1e6))


@pytest.mark.parametrize("seed", range(5))
def test_random_fluctuation_of_the_share_is_allowed(seed: int) -> None:
    quarantine = Quarantine(max_rate=0.01)
    bad = np.random.default_rng(seed).random(20_000) < 0.01
    error = SampleError("000000.tar", 0, "key", "reason")
    for slot in range(20_000):
        quarantine.count_slot()
        if bad[slot]:
            quarantine.add(slot, error, "read")
    with pytest.raises(ShardError, match="far above"):
        for slot in range(20_000, 21_000):
            quarantine.count_slot()
            quarantine.add(slot, error, "read")


def test_ranks_share_one_log_and_ignore_a_torn_line(tmp_path: Path) -> None:
    log = tmp_path / "quarantine.jsonl"
    log.write_text('{"slot": 3, "sha')
    first, second = Quarantine(log), Quarantine(log)
    error = SampleError("000000.tar", 5, "key", "broken")
    for slot in (10, 30):
        first.add(slot, error, "decode")
        second.add(slot, error, "decode")
    assert second.is_unusable(99, "000000.tar", 5)
    assert len(log.read_text().splitlines()) == 2


def test_missing_remote_shard_stops_the_reader(tmp_path: Path) -> None:
    packed_set(tmp_path, 40)
    with faulty_server(tmp_path) as server:
        remote = ShardSet.open(f"{server.url}/set", RetryPolicy(20.0, 2.0, 0.01, 0.05))
        server.gone.add("/set/shards/000001.tar")
        log = tmp_path / "quarantine.jsonl"
        source = Source(remote, Order(remote.sizes, seed=1), threads=2, quarantine=Quarantine(log, max_rate=1.0))
        with pytest.raises(ShardError, match=r"/set/shards/000001\.tar does not exist") as raised:
            list(source.batches([np.arange(40)]))
        assert not isinstance(raised.value, SampleError)
        assert not log.exists()
        source.close()


@settings(max_examples=60, deadline=None)
@given(
    noise=st.lists(st.one_of(st.binary(max_size=60), st.just(b"[" * 100_000), st.just(b'{"slot": 1e999}')), max_size=5)
)
def test_no_content_of_the_log_is_an_error(tmp_path_factory: pytest.TempPathFactory, noise: list[bytes]) -> None:
    log = tmp_path_factory.mktemp("noise") / "quarantine.jsonl"
    known = Entry(5, "000000.tar", 7, "key", "decode", "reason")
    log.write_bytes(b"\n".join([*noise, json.dumps(asdict(known)).encode(), *noise, b"{"]))
    quarantine = Quarantine(log)
    assert quarantine.is_unusable(9, "000000.tar", 7) or any(b"\n" in each for each in noise)
    quarantine.add(6, SampleError("000000.tar", 8, "caf\udce9\x1b", "reason"), "read")
    again = Quarantine(log)
    assert again.is_unusable(6, "000000.tar", 8) and not again.is_unusable(7, "000000.tar", 8)


@pytest.mark.parametrize(
    "change",
    [{"slot": "5"}, {"slot": True}, {"index": 7.0}, {"shard": ["a"]}, {"key": None}, {"stage": "other"}, {"more": 1}],
)
def test_entries_with_values_of_other_types_are_skipped_and_counted(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    entry = {"slot": 5, "shard": "000000.tar", "index": 7, "key": "key", "stage": "read", "reason": "reason"}
    log = tmp_path / "quarantine.jsonl"
    log.write_text(f"{json.dumps(entry | change)}\n" * 3)
    assert not Quarantine(log).is_unusable(5, "000000.tar", 7)
    assert "3 invalid lines" in caplog.text


def test_entries_wait_for_a_log_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(append_log, "RETRY_SECONDS", 0.0)
    log = tmp_path / "missing" / "quarantine.jsonl"
    quarantine = Quarantine(log)
    for sample in range(3):
        quarantine.add(sample, SampleError("000000.tar", sample, "key", "reason"), "read")
    assert quarantine.is_unusable(2, "000000.tar", 2) and len(caplog.records) == 1
    log.parent.mkdir()
    time.sleep(0.05)  # 20 times as long as an attempt took
    quarantine.count_slot()
    assert [entry.index for entry in _log(log)] == [0, 1, 2]
