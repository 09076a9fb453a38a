"""A failure of the source or of the output stops a packing; the next start finishes the same set."""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn_images import draw_folder, file_contents

from shards.errors import ShardError
from shards.packing import items
from shards.packing.index_tars import index_tars
from shards.packing.items import SourceUnreachable
from shards.packing.pack import PackOptions, pack
from streamtrain.cli.main import main

_SMALL = PackOptions(shard_bytes=10_000)
_FAULTS = ("ESTALE", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOTCONN", "ETIMEDOUT", "EACCES")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "_PAUSES", (0.0, 0.0))


def _fail_on(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, fails: Callable[[str, Any], int]) -> None:
    """Make a function raise an OSError with the number that ``fails`` returns for a path, 0 for none."""
    original = getattr(module, name)

    def call(path: Any, *arguments: Any, **settings: Any) -> Any:
        if number := fails(str(path), arguments):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **settings)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("fault", _FAULTS)
def test_source_that_fails_stops_the_packing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    images = draw_folder(tmp_path / "images", 30)
    pack(images, tmp_path / "expected", _SMALL)
    arguments = ["pack", "--src", str(images), "--out", str(tmp_path / "set"), "--shard-size", "10kB", "--workers", "1"]
    with monkeypatch.context() as patch:
        number = getattr(errno, fault)
        _fail_on(patch, builtins, "open", lambda path, _: number * (path.endswith("image 017.jpg")))
        assert main(arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "image 017.jpg cannot be read" in lines[0] and "re-run to resume" in lines[0]
    assert main(arguments) == 0
    assert file_contents(tmp_path / "set") == file_contents(tmp_path / "expected")


@pytest.mark.parametrize("fault", ["ESTALE", "EIO"])
def test_source_that_fails_for_a_moment_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    images = draw_folder(tmp_path / "images", 10)
    remaining = [getattr(errno, fault)] * 2
    with monkeypatch.context() as patch:
        _fail_on(patch, builtins, "open", lambda path, _: remaining.pop() if path.endswith(".jpg") and remaining else 0)
        report = pack(images, tmp_path / "set", _SMALL)
    assert (report.manifest.num_samples, report.num_rejected, remaining) == (10, 0, [])


def test_source_that_is_unmounted_or_replaced_stops_the_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_folder(tmp_path / "images", 30)
    pack(images, tmp_path / "expected", _SMALL)
    hidden = tmp_path / "hidden"

    def unmount(path: str, _: object) -> int:
        if path.endswith("image 017.jpg") and not hidden.exists():
            images.rename(hidden)
            images.mkdir()
        return 0

    with monkeypatch.context() as patch:
        _fail_on(patch, builtins, "open", unmount)
        with pytest.raises(SourceUnreachable, match="was removed, replaced or unmounted; once it is back, re-run"):
            pack(images, tmp_path / "set", _SMALL)
    images.rmdir()
    hidden.rename(images)
    pack(images, tmp_path / "set", _SMALL)
    assert file_contents(tmp_path / "set") == file_contents(tmp_path / "expected")


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EDQUOT"])
def test_any_failing_call_on_the_output_is_one_error_and_the_set_is_the_same_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    images = draw_folder(tmp_path / "images", 12)
    pack(images, tmp_path / "expected", _SMALL)
    number, out = getattr(errno, fault), tmp_path / "set"
    for fatal in itertools.count():
        calls = itertools.count()

        def fails(path: str, arguments: Any, calls: Any = calls, fatal: int = fatal) -> int:
            is_output = path.isdigit() or (path.startswith(str(out)) and (not arguments or arguments[0] != "rb"))
            return number if is_output and next(calls) == fatal else 0

        with monkeypatch.context() as patch:
            for module, name in ((builtins, "open"), (os, "fsync"), (os, "replace"), (os, "mkdir")):
                _fail_on(patch, module, name, fails)
            try:
                pack(images, out, _SMALL)
            except ShardError as error:
                assert os.strerror(number) in str(error) and str(out) in str(error)
        is_over = next(calls) <= fatal  # the packing made fewer calls
        pack(images, out, _SMALL)
        assert file_contents(out) == file_contents(tmp_path / "expected")
        shutil.rmtree(out)
        if is_over:
            break
    assert fatal > 20


def test_full_disk_while_indexing_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(draw_folder(tmp_path / "images", 5), tmp_path / "set")
    tar = str(tmp_path / "set" / "shards" / "000000.tar")
    with monkeypatch.context() as patch:
        _fail_on(patch, os, "fsync", lambda *_: errno.ENOSPC)
        with pytest.raises(ShardError, match=r"writing to .*indexed failed \(No space left on device\)"):
            index_tars([tar], tmp_path / "indexed")
    assert not (tmp_path / "indexed").exists()
    index_tars([tar], tmp_path / "indexed")
