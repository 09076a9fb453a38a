"""Records are whole and in order, whatever part of them the disk takes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format import append_log
from shards.format.append_log import AppendLog


class Disk:
    """Replaces ``os.write`` by one that takes a given number of bytes at each call, and none for a negative number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, can_truncate: bool = True) -> None:
        self.takes: list[int] = []
        self._write = os.write
        monkeypatch.setattr(append_log, "RETRY_SECONDS", 0.0)
        monkeypatch.setattr(os, "write", self.write)
        if not can_truncate:
            monkeypatch.setattr(os, "ftruncate", self.fail)

    def fail(self, *_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, file: int, content: bytes) -> int:
        limit = self.takes.pop(0) if self.takes else len(content)
        return self.fail() if limit < 0 else self._write(file, bytes(content)[:limit])


TAKES = st.lists(st.integers(-1, 9), max_size=30)


@pytest.mark.parametrize("is_shared", [False, True])
@settings(max_examples=60, deadline=None)
@given(takes=TAKES, torn=st.binary(max_size=9))
def test_every_record_is_written_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, is_shared: bool, takes: list[int], torn: bytes
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    torn = torn.replace(b"\n", b"")
    path.write_bytes(b"first\n" + torn)
    records = [f"record {number}\n".encode() for number in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        disk.takes = list(takes)
        log = AppendLog(path, is_shared=is_shared)
        log._next_attempt = -1e9
        for record in records:
            log.append(record)
            log._next_attempt = -1e9
        disk.takes = []
        log.close()
    content = path.read_bytes()
    assert log.num_lost == 0
    if is_shared:
        # torn pieces stay, on lines of their own; a record that lacked only its line break is there twice
        whole = [line for line in content.splitlines(keepends=True) if line in records]
        assert list(dict.fromkeys(whole)) == records and content.endswith(b"\n")
    else:
        assert content == b"first\n" + b"".join(records)


def test_a_torn_record_that_cannot_be_removed_delays_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    with monkeypatch.context() as patch:
        disk = Disk(patch, can_truncate=False)
        log = AppendLog(path)
        log.append(b"one\n")
        disk.takes = [2, -1]
        log.append(b"two\n")
        log._next_attempt = -1e9
        log.append(b"three\n")
        assert path.read_bytes() == b"one\ntw"
    log.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_one_warning_a_bounded_memory_and_a_count_of_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(append_log, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(append_log, "MAX_PENDING_BYTES", 100)
    path = tmp_path / "missing" / "log"
    log = AppendLog(path)
    for number in range(50):
        log.append(f"record {number:02d}\n".encode())
    path.parent.mkdir()
    log.append(b"last\n")
    log.close()
    assert path.read_text().splitlines() == [*(f"record {number}" for number in range(41, 50)), "last"]
    assert log.num_lost == 41
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "No such file" in caplog.text and "41 records did not fit in memory" in caplog.text


def test_a_failed_preparation_delays_the_records_and_is_repeated(tmp_path: Path) -> None:
    calls: list[int] = []

    def prepare() -> None:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")

    log = AppendLog(tmp_path / "log", prepare=prepare)
    for number in range(5):
        log._next_attempt = -1e9
        log.append(b"%d\n" % number)
    assert len(calls) == 3 and (tmp_path / "log").read_bytes() == b"0\n1\n2\n3\n4\n"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"keep")
    (tmp_path / "log").symlink_to(tmp_path / "other")
    log = AppendLog(tmp_path / "log")
    log.append(b"record\n")
    log.close()
    assert (tmp_path / "other").read_bytes() == b"keep" and log.num_lost == 1
