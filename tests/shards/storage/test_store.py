"""Objects arrive complete despite every kind of server fault, or an error names them."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer, faulty_server

from shards.errors import ShardError
from shards.storage.store import DownloadStopped, RetryPolicy, Store

_CONTENT = np.random.default_rng(0).bytes((9 << 20) + 123)  # three pieces
_FAST_RETRIES = RetryPolicy(20.0, stall_seconds=1.5, first_pause_seconds=0.01, longest_pause_seconds=0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "big").write_bytes(_CONTENT)
    (tmp_path / "set" / "small").write_bytes(b"manifest")
    with faulty_server(tmp_path) as running:
        yield running


@pytest.mark.parametrize("fault", ["503", "stall", "cut", "short", "whole"])
def test_each_fault_retries_one_piece_only(
    server: FaultyServer, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(f"{server.url}/set", _FAST_RETRIES)
    server.faults = [None, fault, fault, None]
    with caplog.at_level(logging.WARNING, "shards.storage.store"):
        store.download("big", tmp_path / "got", len(_CONTENT), hashlib.sha256(_CONTENT).hexdigest())
    assert (tmp_path / "got").read_bytes() == _CONTENT
    repeats = 0 if fault == "whole" else 2
    logged = [record for record in caplog.records if "set/big: attempt" in record.getMessage()]
    # a busy machine may time out on an attempt without a fault
    assert len(logged) >= repeats
    assert len(server.gets) == 3 + len(logged)


def test_download_resumes_a_partial_file(server: FaultyServer, tmp_path: Path) -> None:
    target = tmp_path / "got"
    target.write_bytes(_CONTENT[: 5 << 20])
    store = Store(f"{server.url}/set", _FAST_RETRIES)
    store.download("big", target, len(_CONTENT), hashlib.sha256(_CONTENT).hexdigest())
    assert target.read_bytes() == _CONTENT
    assert len(server.gets) == 2


def test_damaged_partial_file_is_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    target = tmp_path / "got"
    target.write_bytes(b"not the beginning")
    store = Store(f"{server.url}/set", _FAST_RETRIES)
    store.download("big", target, len(_CONTENT), hashlib.sha256(_CONTENT).hexdigest())
    assert target.read_bytes() == _CONTENT
    with pytest.raises(ShardError, match=r"set/big does not match its manifest"):
        store.download("big", target, len(_CONTENT), "0" * 64)
    assert not target.exists()


def test_load_read_and_size(server: FaultyServer) -> None:
    store = Store(f"{server.url}/set", _FAST_RETRIES)
    server.faults = ["503", None, "cut"]
    assert store.load("small", bytes) == b"manifest"
    assert store.read("big", 100, 5 << 20) == _CONTENT[100 : 5 << 20]
    assert store.read("big", 7, 7) == b""
    assert store.size("big") == len(_CONTENT)


def test_missing_object_and_passed_deadline_name_the_object(server: FaultyServer) -> None:
    store = Store(f"{server.url}/set", _FAST_RETRIES)
    server.gone.add("/set/big")
    for ask in (lambda: store.load("big", bytes), lambda: store.read("big", 0, 5), lambda: store.size("big")):
        with pytest.raises(ShardError, match=r"127\.0\.0\.1:\d+/set/big does not exist"):
            ask()
    store = Store(f"{server.url}/set", RetryPolicy(0.5, 1.5, 0.01, 0.05))
    server.faults = ["503"] * 1000
    began = time.monotonic()
    with pytest.raises(ShardError, match=r"set/small could not be read in \d+ attempts over .*503"):
        store.load("small", bytes)
    assert time.monotonic() - began < 5


def test_unsupported_protocols_are_refused() -> None:
    with pytest.raises(ShardError, match="pipe: runs shell commands"):
        Store("pipe:aws s3 cp s3://bucket/set -")
    with pytest.raises(ShardError, match="cannot be read"):
        Store("gopher://old/set")


def test_file_urls_are_supported(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"content")
    (tmp_path / "a").write_bytes(b"")
    store = Store(f"file://{tmp_path}")
    assert store.list_folder("") == ["a", "b"]
    assert store.read("b", 1, 4) == b"ont"


def test_truncated_answer_that_does_not_parse_is_fetched_again(server: FaultyServer) -> None:
    store = Store(f"{server.url}/set", _FAST_RETRIES)

    def parse(content: bytes) -> str:
        if content != b"manifest":
            raise ShardError(f"{content!r} is not a manifest")
        return content.decode()

    server.faults = ["short", "short"]
    assert store.load("small", parse) == "manifest"
    server.faults = ["short"] * 5
    with pytest.raises(ShardError, match="b'mani' is not a manifest"):
        store.load("small", parse)


def test_object_shorter_than_expected_fails_before_the_deadline(server: FaultyServer, tmp_path: Path) -> None:
    store = Store(f"{server.url}/set", RetryPolicy(3600.0, 1.5, 0.01, 0.05))
    with pytest.raises(ShardError, match=r"set/big returned 1048699 bytes from 8388608 instead of 1611392"):
        store.download("big", tmp_path / "got", 10_000_000)
    assert store.traffic.num_bytes == 8 << 20 and store.traffic.num_retries == 4


def test_stopped_download_keeps_its_bytes(server: FaultyServer, tmp_path: Path) -> None:
    store, stop = Store(f"{server.url}/set", RetryPolicy(3600.0, 1.5, 60.0, 60.0)), threading.Event()
    server.faults = [None, "503"]
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    with pytest.raises(DownloadStopped):
        store.download("big", tmp_path / "got", len(_CONTENT), stop=stop)
    assert time.monotonic() - began < 10
    assert (tmp_path / "got").read_bytes() == _CONTENT[: 4 << 20]
