"""Whatever a server sends, a read returns the right bytes or a ShardError, in bounded time and memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from drawn_images import packed_set
from faulty_s3 import faulty_s3
from faulty_server import FaultyServer, faulty_server
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.reading.shard_set import ShardSet, _OriginalShard
from shards.storage.store import RetryPolicy, Store

_CONTENT = np.random.default_rng(0).bytes(300_000)
_SPAN = (1000, 101_000)
_PATIENT = RetryPolicy(20.0, stall_seconds=0.4, first_pause_seconds=0.01, longest_pause_seconds=0.05)
_IMPATIENT = RetryPolicy(0.5, stall_seconds=0.3, first_pause_seconds=0.01, longest_pause_seconds=0.05)
_FAULTS = (*FaultyServer.HOSTILE, "503", "stall", "cut", "short", "whole", None)
_MAX_GROWTH = 250 << 20  # bytes; a document of 64 MiB is held twice for a moment


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    root = tmp_path_factory.mktemp("served")
    (root / "object").write_bytes(_CONTENT)
    with faulty_server(root) as running:
        yield running


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _require_content(content: bytes) -> bytes:
    if content != _CONTENT:
        raise ShardError("it does not parse")
    return content


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
@settings(max_examples=25)
@given(faults=st.lists(st.sampled_from(_FAULTS), min_size=1, max_size=4), is_whole=st.booleans())
@example(["bomb"] * 5, True)
@example(["endless", "chunked"] * 3, True)
@example(["headers", "slow"], False)
def test_any_answers_give_the_right_bytes_or_an_error(
    server: FaultyServer, faults: list[str | None], is_whole: bool
) -> None:
    store, before = Store(server.url, _IMPATIENT), _resident_bytes()
    server.faults = list(faults)
    began = time.monotonic()
    try:
        if is_whole:
            assert store.load("object", _require_content) == _CONTENT
        else:
            assert store.read("object", *_SPAN) == _CONTENT[slice(*_SPAN)]
    except ShardError as error:
        assert "\n" not in str(error)
    server.faults = []
    assert time.monotonic() - began < _IMPATIENT.deadline_seconds + _IMPATIENT.stall_seconds + 2.0
    assert _resident_bytes() - before < _MAX_GROWTH


@pytest.mark.parametrize("fault", [fault for fault in _FAULTS if fault not in (None, "whole")])
def test_each_fault_of_a_range_is_retried(server: FaultyServer, fault: str) -> None:
    # redirects to itself take one fault for each request
    server.faults = [fault] * (11 if fault == "loop" else 2)
    assert Store(server.url, _PATIENT).read("object", *_SPAN) == _CONTENT[slice(*_SPAN)]
    assert not server.faults


def test_nothing_is_received_after_an_attempt(server: FaultyServer) -> None:
    store = Store(server.url, _IMPATIENT)
    server.faults = ["slow"] * 10
    with pytest.raises(ShardError, match=r"could not be read in \d+ attempts .* no answer within 0.3 s"):
        store.load("object", bytes)
    server.faults = []
    deadline = time.monotonic() + 10.0
    # the threads of the server end when their connections are closed
    while (left := _serving()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left and not [thread for thread in threading.enumerate() if thread.name == "store-attempt"]


def _serving() -> list[str]:
    frames = sys._current_frames()
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.ident in frames and "_repeat" in _functions(frames[thread.ident])
    ]


def _functions(frame: object) -> list[str]:
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[attr-defined]
    return names


def test_another_range_is_not_held_against_the_image(tmp_path: Path) -> None:
    local = packed_set(tmp_path / "origin", 12)
    with faulty_server(local.path.parent) as server:
        remote = ShardSet.open(f"{server.url}/{local.path.name}", _PATIENT)
        remote.record(0, 0)
        for sample in range(12):
            server.faults = ["range", "whole", "no range"]
            assert remote.read(0, sample) == local.read(0, sample)


def test_bytes_with_a_wrong_checksum_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    local = packed_set(tmp_path / "origin", 3)
    served = tmp_path / "served"
    shutil.copytree(local.path, served / "set")
    with faulty_server(served) as server:
        remote = ShardSet.open(f"{server.url}/set", _PATIENT)
        record = remote.record(0, 1)
        tar = served / "set" / "shards" / local.name(0)
        sound = tar.read_bytes()
        position = int(record["offset"]) + int(record["length"]) // 2
        tar.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        original = remote._original(0)

        def read_and_repair(length: int, offset: int) -> bytes:
            content = original.read(length, offset)
            tar.write_bytes(sound)
            return content

        monkeypatch.setitem(remote._open, 0, _OriginalShard(original.index, read_and_repair))
        assert remote.read(0, 1) == local.read(0, 1)
        assert "wrong CRC-32" in caplog.text and "reading it again" in caplog.text


def test_documents_have_a_limit(server: FaultyServer) -> None:
    store = Store(server.url, _PATIENT)
    assert store.load("object", bytes, len(_CONTENT)) == _CONTENT
    for files in (store, _memory_store()):
        with pytest.raises(ShardError, match=r"/object: the object has more than 1000 bytes"):
            files.load("object", bytes, 1000)


def _memory_store() -> Store:
    fsspec.filesystem("memory").pipe_file("/limits/object", _CONTENT)
    return Store("memory://limits", _PATIENT)


def test_from_s3_answers_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_s3() as s3:
        s3.set_environment(monkeypatch)
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("bucket")
        files.pipe_file("bucket/object", _CONTENT)
        files.pipe_file("bucket/empty", b"")
        store = Store("s3://bucket", _PATIENT)
        s3.faults = ["whole", "short", "stall", None]
        assert store.read("object", *_SPAN) == _CONTENT[slice(*_SPAN)]
        assert store.load("object", bytes) == _CONTENT and store.load("empty", bytes) == b""
        with pytest.raises(ShardError, match="more than 1000 bytes"):
            store.load("object", bytes, 1000)
        with pytest.raises(ShardError, match="s3://bucket/missing does not exist"):
            store.load("missing", bytes)


def test_a_download_needs_free_space(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, target = Store(server.url, _PATIENT), tmp_path / "copy"
    requests = len(server.gets)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, len(_CONTENT) - 1))
    with pytest.raises(ShardError, match=r"/object \(300000 bytes\) cannot be stored in .* 299999 are free"):
        store.copy("object", target)
    assert not target.exists() and len(server.gets) == requests
    monkeypatch.undo()
    store.copy("object", target)
    assert target.read_bytes() == _CONTENT


def test_a_full_disk_ends_indexing_with_one_line(server: FaultyServer, tmp_path: Path) -> None:
    """The test limits the size of files instead of filling a disk."""
    (server.root / "some.tar").write_bytes(bytes(1 << 20))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18)); "
        "from streamtrain.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["index", "--src", f"{server.url}/some.tar", "--out", str(tmp_path / "set")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "some.tar (1048576 bytes) cannot be stored in" in done.stderr
    assert not (tmp_path / "set").exists()


def test_a_folder_page_lists_its_links_only(tmp_path: Path) -> None:
    page = (
        '<a href="?C=N;O=D">Name</a> <a href="../">up</a> <a href="a.tar">a</a> <A HREF=\'/set/b%20c.tar\'>b</A> '
        '<a href="http://elsewhere/set/x.tar">x</a> <a href="deep/er.tar">y</a> <a href="sub/">sub</a> '
        '<a href="file:///set/z.tar">z</a> <a href="//[bad">q</a>'
    )
    (tmp_path / "set").write_text(page)
    with faulty_server(tmp_path) as server:
        store = Store(f"{server.url}/set", _PATIENT)
        assert store.list_folder("") == ["a.tar", "b%20c.tar", "sub"]
        assert list(store.list_tree()) == ["a.tar", "b%20c.tar"]  # sub/ has no page
