"""Compiled code is loaded only from a folder that no other user can write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cpu_kernels import needs_kernels

from streamtrain.ops.cpu import build, private_folder
from streamtrain.ops.cpu.private_folder import NotPrivateError, open_or_make, open_private, open_trusted


def write(text: str) -> object:
    return lambda path: path.write_text(text)


def read(descriptor: int) -> str:
    with open(descriptor) as file:
        return file.read()


def owned_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this user's files count as another user's, since only root could create such."""
    monkeypatch.setattr(private_folder, "_trusted_owners", lambda: (os.geteuid() + 1, os.geteuid() + 1))


def test_a_new_folder_and_its_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with open_private(tmp_path / "a" / "b") as folder:
            assert read(open_or_make(folder, "code", write("new"))) == "new"
            assert read(open_or_make(folder, "code", write("other"))) == "new"
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o77 == 0 and (tmp_path / "a/b/code").stat().st_mode & 0o77 == 0
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["code", "code.lock"]


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_write_access_of_others_is_removed(mode: int, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(mode)
    with open_private(tmp_path / "folder"):
        assert (tmp_path / "folder").stat().st_mode & 0o777 == mode & ~0o022


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_have_written_is_made_again(mode: int, tmp_path: Path) -> None:
    (tmp_path / "code").write_text("planted")
    (tmp_path / "code").chmod(mode)
    with open_private(tmp_path) as folder:
        assert open_trusted(folder, "code") is None
        assert read(open_or_make(folder, "code", write("new"))) == "new"


def test_a_link_is_never_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("planted")
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "folder" / "code").symlink_to(tmp_path / "target")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with open_private(tmp_path / "folder") as folder:
        assert read(open_or_make(folder, "code", write("new"))) == "new"
    assert (tmp_path / "target").read_text() == "planted"
    with pytest.raises(NotPrivateError, match="is a link"), open_private(tmp_path / "link"):
        pass


def test_a_special_file_blocks_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "code", 0o600)
    with open_private(tmp_path) as folder:
        assert open_trusted(folder, "code") is None


def test_a_folder_or_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").write_text("planted")
    with open_private(tmp_path) as folder:
        owned_by_another(monkeypatch)
        assert open_trusted(folder, "code") is None
    with pytest.raises(NotPrivateError, match="belongs to another user"), open_private(tmp_path):
        pass


def test_the_opened_file_stays_when_the_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    with open_private(tmp_path / "folder") as folder:
        (tmp_path / "folder").rename(tmp_path / "moved")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "code").write_text("planted")
        assert read(open_or_make(folder, "code", write("new"))) == "new"
        assert os.readlink(f"/proc/self/fd/{folder}") == str(tmp_path / "moved")


@needs_kernels
def test_a_planted_library_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder shared by users has another user's subfolder: the kernels come from the user's own cache."""
    planted = tmp_path / "shared" / "streamtrain"
    planted.mkdir(parents=True)
    (planted / build.library_name()).write_text("planted")
    real = private_folder.os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        other = os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(planted))
        return os.stat_result((*status[:4], 12345, *status[5:])) if other else status

    monkeypatch.setattr(private_folder.os, "fstat", fstat)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(build, "_load_library", build._load_library.__wrapped__)
    assert build.load.__wrapped__(torch.float32)
    assert "belongs to another user (uid 12345)" in caplog.text
    assert os.listdir(planted) == [build.library_name()]
