"""Remote sources and remote sets give the same set as local ones, and nothing is sent twice."""

from __future__ import annotations

import functools
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from drawn_images import (
    add_to_tar,
    all_payloads,
    draw_folder,
    drawn_image,
    encoded,
    file_contents,
    overwrite,
    packed_set,
)

from shards.errors import ShardError
from shards.format.records import load_index
from shards.packing import items
from shards.packing import upload as upload_module
from shards.packing.index_tars import index_tars
from shards.packing.pack import PackOptions, pack, scratch_folder
from shards.packing.upload import Upload
from shards.packing.verify import verify
from shards.reading.order import Order
from shards.reading.shard_set import ShardSet
from shards.reading.source import Source
from shards.storage.store import RetryPolicy, Store

_SMALL = PackOptions(shard_bytes=20_000)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty folder in fsspec's store in memory, packed in a cache folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://bucket/set"
    files.store.clear()


def _remote_files(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {name: store.load(name, bytes) for name in store.list_tree()}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the uploaded objects, in order."""
    names: list[str] = []
    original = Store.upload

    def upload(store: Store, source: Path, name: str) -> None:
        names.append(name)
        original(store, source, name)

    monkeypatch.setattr(Store, "upload", upload)
    return names


def test_uploaded_set_equals_local_set_and_manifest_is_sent_last(tmp_path: Path, bucket: str, sent: list[str]) -> None:
    images = draw_folder(tmp_path / "images", 50, ("cat", "dog"))
    (images / "cat" / "broken.jpg").write_bytes(b"text")
    local = pack(images, tmp_path / "set", _SMALL)
    assert pack(images, bucket, _SMALL, scratch=tmp_path / "scratch") == local
    assert _remote_files(bucket) == file_contents(tmp_path / "set")
    assert sent[0] == "packing.jsonl" and sent[-1] == "manifest.json" and len(sent) == len(set(sent))
    assert not (tmp_path / "scratch").exists()
    assert verify(bucket) == []
    remote = ShardSet.open(bucket)
    source = Source(remote, Order(remote.sizes, seed=1), threads=2)
    assert len(next(source.batches([np.arange(50)])).payloads) == 50
    source.close()

    sent.clear()
    assert pack(images, bucket, _SMALL) == replace(local, is_new=False) and sent == []
    assert not scratch_folder(bucket).exists()
    with pytest.raises(ShardError, match="already contains another shard set"):
        pack(images, bucket, PackOptions(max_side=10))
    assert not scratch_folder(bucket).exists()


@pytest.mark.parametrize("kept", [True, False])
def test_interrupted_upload_resumes_and_sends_nothing_twice(
    tmp_path: Path, bucket: str, sent: list[str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_folder(tmp_path / "images", 50)
    pack(images, tmp_path / "set", _SMALL)
    original = Upload.send_shard
    with monkeypatch.context() as patch:

        def cut(upload: Upload, entry: object) -> None:
            if len(sent) > 5:
                raise KeyboardInterrupt
            original(upload, entry)

        patch.setattr(Upload, "send_shard", cut)
        with pytest.raises(KeyboardInterrupt):
            pack(images, bucket, _SMALL, scratch=tmp_path / "scratch")
    with pytest.raises(ShardError, match="does not exist"):
        Store(bucket, RetryPolicy(1.0, 1.0, 0.01)).load("manifest.json", bytes)
    with pytest.raises(ShardError, match="interrupted packing of another source"):
        pack(images, bucket, PackOptions(shard_bytes=30_000), scratch=tmp_path / "other scratch")
    assert not (tmp_path / "other scratch").exists()
    torn = "/bucket/set/shards/000000.tar"
    files = fsspec.filesystem("memory")
    if not kept:
        # resumed on another machine, with a truncated object in the store
        files.pipe_file(torn, bytes(files.cat_file(torn))[:1000])
    before = list(sent)
    pack(images, bucket, _SMALL, scratch=tmp_path / ("scratch" if kept else "elsewhere"))
    assert _remote_files(bucket) == file_contents(tmp_path / "set")
    twice = [name for name in sent[len(before) :] if name in before]
    assert twice == ([] if kept else ["shards/000000.tar"])


def test_errors_of_uploads(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = draw_folder(tmp_path / "images", 50)
    pack(images, bucket, _SMALL, scratch=tmp_path / "whole")
    entries = list(ShardSet.open(bucket).manifest.shards)
    files = fsspec.filesystem("memory")
    for name in ("manifest.json", "rejected.jsonl", "shards/000001.tar"):
        files.rm_file(f"/bucket/set/{name}")
    with pytest.raises(ShardError, match=r"has other files, such as index/000000\.idx"):
        pack(images, bucket, _SMALL, scratch=tmp_path / "scratch")
    upload = Upload(bucket, tmp_path)
    files.pipe_file("/bucket/set/packing.jsonl", b'{"fingerprint": "f"}\n')
    assert upload.find_finished("f") is None
    with pytest.raises(ShardError, match=r"shards/000001\.tar is missing; to pack it again, delete"):
        upload.begin("f", entries)
    files.pipe_file("/bucket/set/my file", b"")
    with pytest.raises(ShardError, match="has other files, such as my file"):
        pack(images, bucket, _SMALL, scratch=tmp_path / "scratch")
    with pytest.raises(ShardError, match="is read-only; give a folder, or a URL such as s3"):
        pack(images, "http://127.0.0.1:1/set", _SMALL)
    closed = (tmp_path / "file").as_uri() + "/set"
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(upload_module, "BULK_POLICY", RetryPolicy(0.2, 1.0, 0.01, 0.02))
    with pytest.raises(ShardError, match=r"/set/packing\.jsonl cannot be written \(.*\); fix that and re-run"):
        pack(images, closed, _SMALL, scratch=tmp_path / "scratch")


@contextmanager
def _listing_server(root: Path) -> Iterator[str]:
    """Serve folders as web pages with links."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_remote_sources_pack_like_local_ones(tmp_path: Path, bucket: str) -> None:
    images = draw_folder(tmp_path / "www" / "images", 12, ("cat", "a dog"))
    (images / "cat" / ".hidden.jpg").write_bytes(b"")
    (images / "notes.txt").write_bytes(b"")
    pack(images, tmp_path / "local", _SMALL)
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        with tarfile.open(tmp_path / "www" / f"images{suffix}", mode) as tar:
            for path in sorted(images.rglob("*.jpg")):
                tar.add(path, path.relative_to(images))
    files = fsspec.filesystem("memory")
    files.put(str(images), "/bucket/images", recursive=True)
    with _listing_server(tmp_path / "www") as url:
        names = sorted(path.relative_to(images).as_posix() for path in images.rglob("image*.jpg"))
        lines = (f"{url}/images/{name.replace(' ', '%20')}\t{name.split('/')[0]}" for name in names)
        (tmp_path / "list.txt").write_text("\n".join(lines))
        sources = ["memory://bucket/images", f"{url}/images/", f"{url}/images.tar", f"{url}/images.tar.gz"]
        for number, source in enumerate([*sources, tmp_path / "list.txt"]):
            out = tmp_path / f"set{number}"
            report = pack(source, out, _SMALL, workers=2 if number == 1 else 1)
            assert all_payloads(ShardSet.open(out)) == all_payloads(ShardSet.open(tmp_path / "local")), source
            assert report.manifest.classes == ("a dog", "cat")
            assert sorted(path.name for path in out.iterdir()) == ["index", "manifest.json", "rejected.jsonl", "shards"]


def test_unreachable_store_stops_packing_and_missing_object_does_not(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("memory")
    for number in range(4):
        files.pipe_file(f"/bucket/images/{number}.jpg", encoded(drawn_image(number)))
    open_store = functools.partial(Store, policy=RetryPolicy(0.3, 1.0, 0.01, 0.02))
    monkeypatch.setattr(items, "cached_store", open_store)
    inner = type(files).cat_file

    def failing(self: object, path: str, *arguments: object, **options: object) -> bytes:
        if path.endswith("2.jpg"):
            raise failure
        return inner(self, path, *arguments, **options)

    monkeypatch.setattr(type(files), "cat_file", failing)
    failure: Exception = ConnectionError("connection lost")
    with pytest.raises(ShardError, match=r"2\.jpg could not be read in .* connection lost; once it can be read"):
        pack("memory://bucket/images", tmp_path / "set", _SMALL)
    failure = FileNotFoundError("gone")
    report = pack("memory://bucket/images", tmp_path / "set", _SMALL)
    assert (report.manifest.num_samples, report.num_rejected) == (3, 1)


def test_verify_finds_the_same_faults_in_a_remote_set(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, 40)
    path, url = shard_set.path, (tmp_path / "set").as_uri()
    assert verify(url) == verify(url, workers=2) == []
    overwrite(shard_set, 0, 3, b"damage")
    tar_path = shard_set.tar_path(1)
    tar_path.write_bytes(tar_path.read_bytes()[:15_000])
    (path / "index" / "000000.idx").unlink()
    (path / "shards" / "left_over.tar").write_bytes(b"")
    expected = [(fault.file, fault.index, fault.key) for fault in verify(path)]
    assert [(fault.file, fault.index, fault.key) for fault in verify(url)] == expected
    assert ("shards/000000.tar", 3) in [(file, index) for file, index, _ in expected] and len(expected) > 5


def test_verify_of_an_indexed_set_with_a_missing_tar(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with tarfile.open(foreign / "a b.tar", "w") as tar:
        for number in range(3):
            add_to_tar(tar, f"a b{number}.jpg", encoded(drawn_image(number)))
    index_tars([(foreign / "a b.tar").as_uri().replace("%20", " ")], tmp_path / "indexed")
    assert len(load_index(tmp_path / "indexed" / "index" / "000000-a b.npy")) == 3
    assert verify(tmp_path / "indexed") == []
    (foreign / "a b.tar").unlink()
    (fault,) = verify(tmp_path / "indexed")
    assert fault.file == "shards/000000-a b.tar" and fault.reason.endswith("a b.tar does not exist")


def test_default_scratch_folder_is_private_and_resumed_after_a_kill(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_folder(tmp_path / "images", 30)
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path / "shared"))

        def kill(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(Upload, "finish", kill)
        with pytest.raises(KeyboardInterrupt):
            pack(images, bucket, _SMALL)
    scratch = scratch_folder(bucket)
    assert scratch.parent == tmp_path / "cache" / "streamtrain"
    for folder in (scratch.parent, scratch):
        assert folder.stat().st_mode & 0o777 == 0o700
    pack(images, bucket, _SMALL)
    assert ShardSet.open(bucket).num_samples == 30 and not scratch.exists()


@pytest.mark.parametrize("kind", ["link", "writable for all", "another user's"])
@pytest.mark.parametrize("level", ["scratch", "parent", "option"])
def test_foreign_scratch_folder_is_refused(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, kind: str, level: str
) -> None:
    images = draw_folder(tmp_path / "images", 3)
    (tmp_path / "victim" / "shards").mkdir(parents=True)
    (tmp_path / "victim" / "shards" / "000000.tar").write_bytes(b"precious")
    default = scratch_folder(bucket)
    place = {"scratch": default, "parent": default.parent, "option": tmp_path / "option"}[level]
    if level == "parent":
        place.rmdir()
    if kind == "link":
        place.symlink_to(tmp_path / "victim")
    else:
        place.mkdir()
        place.chmod(0o777 if kind == "writable for all" else 0o700)
    if kind == "another user's":
        owner = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(ShardError, match=r"--scratch .* (is a link|belongs to another user or is writable for all)"):
        pack(images, bucket, _SMALL, scratch=place if level == "option" else None)
    assert [file.read_bytes() for file in (tmp_path / "victim").rglob("*.tar")] == [b"precious"]
