"""Reads of local files: errors of a whole file system are retried, errors of one offset are not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.reading import local_files
from shards.reading.local_files import LocalFile


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFile:
    (tmp_path / "0.tar").write_bytes(b"0123456789")
    monkeypatch.setattr(local_files, "_PAUSES", (0.0, 0.0))
    return LocalFile(tmp_path / "0.tar")


def _failing(times: int, code: int, name: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Make a function of ``os`` fail ``times`` times; return the list of its calls."""
    function: Callable[..., object] = getattr(os, name)
    calls: list[object] = []

    def call(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) <= times:
            raise OSError(code, os.strerror(code))
        return function(*arguments, **options)

    monkeypatch.setattr(os, name, call)
    return calls


def test_reads_end_with_the_file(file: LocalFile) -> None:
    assert (file.read(3, 2), file.read(9, 8), file.read(1, 100), file.num_bytes()) == (b"234", b"89", b"", 10)


def test_a_stale_file_is_opened_again(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file.read(1, 0) == b"0"
    opened = _failing(0, 0, "open", monkeypatch)
    reads = _failing(2, errno.ESTALE, "pread", monkeypatch)
    assert file.read(3, 2) == b"234"
    assert (len(opened), len(reads)) == (2, 3)


@pytest.mark.parametrize("name", ["ESTALE", "ENOTCONN", "ENOMEM", "EACCES"])
def test_a_failing_source_is_one_error_that_can_be_resumed(
    name: str, file: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(99, getattr(errno, name), "pread", monkeypatch)
    with pytest.raises(ShardError, match=r"0\.tar cannot be read .*re-run to resume"):
        file.read(3, 2)


def test_an_error_at_one_offset_is_not_retried(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = _failing(1, errno.EIO, "pread", monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        file.read(3, 2)
    assert len(reads) == 1


def test_a_lack_of_descriptors_closes_other_files_first(
    file: LocalFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [LocalFile(tmp_path / "0.tar") for _ in range(8)]
    assert [other.read(1, 0) for other in others] == [b"0"] * 8
    opened = _failing(1, errno.EMFILE, "open", monkeypatch)
    closed = _failing(0, 0, "close", monkeypatch)
    assert file.read(1, 1) == b"1"
    assert len(opened) == 2 and len(closed) >= 4


@pytest.mark.parametrize(("name", "remedy"), [("EMFILE", "ulimit -n"), ("ENFILE", "fs.file-max")])
def test_a_lasting_lack_of_descriptors_is_named(
    name: str, remedy: str, file: LocalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(99, getattr(errno, name), "open", monkeypatch)
    with pytest.raises(ShardError, match=remedy):
        file.read(1, 0)


def test_a_file_that_cannot_be_opened_is_no_damaged_image(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(1, errno.EIO, "open", monkeypatch)
    with pytest.raises(ShardError, match="cannot be opened"):
        file.read(1, 0)


def test_short_reads_are_continued(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda number, length, offset: pread(number, min(length, 2), offset))
    assert file.read(7, 1) == b"1234567"


def test_a_file_closed_by_another_thread_is_read_to_the_end(file: LocalFile, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, others = os.pread, [LocalFile(file.path.parent / "other") for _ in range(3)]

    (file.path.parent / "other").write_bytes(b"abcdefghij")

    def evict_first(number: int, length: int, offset: int) -> bytes:
        monkeypatch.setattr(os, "pread", pread)
        local_files._open_files.close_half()
        local_files._open_files.close_half()
        local_files._open_files.drop(id(file))
        assert [other.read(1, 0) for other in others] == [b"a"] * 3  # would reuse the number
        return pread(number, length, offset)

    monkeypatch.setattr(os, "pread", evict_first)
    retries: list[object] = []
    monkeypatch.setattr(local_files.logger, "warning", lambda *arguments: retries.append(arguments))
    assert file.read(3, 2) == b"234" and not retries
