"""The lock of a folder, and a run directory that moves."""

from __future__ import annotations

import errno
import fcntl
import logging
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import pytest

from shards.format.folder_lock import FolderInUse, lock_folder
from streamtrain.errors import StreamtrainError
from streamtrain.run.lock import LOCK_NAME, run_lock


def is_locked(run_dir: Path) -> bool:
    try:
        with run_lock(run_dir, 0):
            return False
    except StreamtrainError as error:
        assert "another run is writing" in str(error)
        return True


def test_a_deleted_lock_file_lets_no_second_run_in(tmp_path: Path) -> None:
    with run_lock(tmp_path, 0):
        (tmp_path / LOCK_NAME).unlink()
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_a_run_of_an_earlier_version_locks_only_the_file(tmp_path: Path) -> None:
    with open(tmp_path / LOCK_NAME, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(tmp_path)


def test_of_many_starts_at_one_instant_one_gets_the_lock(tmp_path: Path) -> None:
    barrier = Barrier(8)

    def start(number: int) -> bool:
        barrier.wait()
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_folder(tmp_path, LOCK_NAME))
            except FolderInUse:
                won = False
            else:
                won = True
            barrier.wait()  # hold the lock until all have tried
            return won

    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            assert Counter(pool.map(start, range(8))) == {True: 1, False: 7}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_file_locks_there_is_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, "not supported")

    monkeypatch.setattr(fcntl, "flock", fail)
    with caplog.at_level(logging.WARNING), lock_folder(tmp_path, LOCK_NAME):
        pass
    (record,) = caplog.records
    assert "without file locks; let only one process write to it" in record.getMessage()


def test_a_link_in_place_of_the_lock_file_is_not_followed(tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    (run / LOCK_NAME).symlink_to(target)
    with run_lock(run, 0):
        assert is_locked(run)
    assert not target.exists() and not (run / LOCK_NAME).is_symlink()


def test_a_folder_in_place_of_the_lock_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(StreamtrainError, match="cannot be locked"), run_lock(tmp_path, 0):
        pass


def test_a_moved_replaced_or_deleted_directory_is_noticed(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    with run_lock(run, 0) as has_moved, run_lock(run, 1) as other_rank_has_moved:
        assert not has_moved()
        run.rename(elsewhere)
        assert has_moved() and not other_rank_has_moved()
        run.mkdir()
        assert has_moved()
        run.rmdir()
        # a link to the new place leads to the same directory
        run.symlink_to(elsewhere)
        assert not has_moved()
        run.unlink()
        elsewhere.rename(run)
        assert not has_moved()
        shutil.rmtree(run)
        assert has_moved()
        # the open descriptor keeps the inode number from being used again
        run.mkdir()
        assert has_moved()
