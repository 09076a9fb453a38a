"""Images from a store, sets to a store: the same set as with local folders, and nothing is sent twice."""

from __future__ import annotations

import functools
import io
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from drawn_images import draw_folder, drawn_image, encoded, packed_set

from shards.errors import ShardError
from shards.format import items
from shards.format.index import load_index
from shards.packing.pack import PackOptions, pack, scratch_folder
from shards.packing.upload import Upload
from shards.packing.verify import verify
from shards.reading.order import Order
from shards.reading.shard_set import ShardSet
from shards.reading.source import Source
from shards.storage.remote_folder import RemoteFolder
from shards.storage.store import RetryPolicy, Store

_SMALL = PackOptions(shard_bytes=20_000)


@pytest.fixture
def bucket() -> Iterator[str]:
    """The URL of an empty folder in fsspec's store in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://bucket/set"
    files.store.clear()


def _there(url: str) -> dict[str, bytes]:
    folder = RemoteFolder(url)
    return {name: folder.load(name, bytes) for name in folder.tree()}


def _here(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the objects that are sent, as they are."""
    names: list[str] = []
    whole = RemoteFolder.upload

    def upload(folder: RemoteFolder, source: Path, name: str) -> None:
        names.append(name)
        whole(folder, source, name)

    monkeypatch.setattr(RemoteFolder, "upload", upload)
    return names


def test_a_set_at_a_url_is_the_local_one_and_its_manifest_comes_last(
    tmp_path: Path, bucket: str, sent: list[str]
) -> None:
    images = draw_folder(tmp_path / "images", 50, ("cat", "dog"))
    (images / "cat" / "broken.jpg").write_bytes(b"text")
    local = pack(images, tmp_path / "set", _SMALL)
    assert pack(images, bucket, _SMALL, scratch=tmp_path / "scratch") == local
    assert _there(bucket) == _here(tmp_path / "set")
    assert sent[0] == "packing.jsonl" and sent[-1] == "manifest.json" and len(sent) == len(set(sent))
    assert not (tmp_path / "scratch").exists()
    assert verify(bucket) == []
    remote = ShardSet.open(bucket)
    source = Source(remote, Order(remote.sizes, seed=1), threads=2)
    assert len(source.fetch(np.arange(50)).payloads) == 50
    source.close()

    sent.clear()
    assert pack(images, bucket, _SMALL) == local and sent == []  # the same again is no error and no work
    assert not scratch_folder(bucket).exists()
    with pytest.raises(ShardError, match="already holds another shard set"):
        pack(images, bucket, PackOptions(max_side=10))
    assert not scratch_folder(bucket).exists()


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_upload_goes_on_and_sends_nothing_twice(
    tmp_path: Path, bucket: str, sent: list[str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_folder(tmp_path / "images", 50)
    pack(images, tmp_path / "set", _SMALL)
    whole = Upload.shard
    with monkeypatch.context() as patch:

        def cut(upload: Upload, entry: object) -> None:
            if len(sent) > 5:
                raise KeyboardInterrupt
            whole(upload, entry)

        patch.setattr(Upload, "shard", cut)
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
        # on another machine, after a store that keeps halves
        files.pipe_file(torn, bytes(files.cat_file(torn))[:1000])
    before = list(sent)
    pack(images, bucket, _SMALL, scratch=tmp_path / ("scratch" if kept else "elsewhere"))
    assert _there(bucket) == _here(tmp_path / "set")
    twice = [name for name in sent[len(before) :] if name in before]
    assert twice == ([] if kept else ["shards/000000.tar"])


def test_an_upload_whose_shards_were_taken_away_says_what_to_do(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_folder(tmp_path / "images", 50)
    pack(images, bucket, _SMALL, scratch=tmp_path / "whole")
    entries = list(ShardSet.open(bucket).manifest.shards)
    files = fsspec.filesystem("memory")
    for name in ("manifest.json", "rejected.jsonl", "shards/000001.tar"):
        files.rm_file(f"/bucket/set/{name}")
    with pytest.raises(ShardError, match=r"holds other files, such as index/000000\.idx"):
        pack(images, bucket, _SMALL, scratch=tmp_path / "scratch")
    upload = Upload(bucket, tmp_path)
    files.pipe_file("/bucket/set/packing.jsonl", b'{"fingerprint": "f"}\n')
    assert upload.finished("f") is None
    with pytest.raises(ShardError, match=r"shards/000001\.tar is gone; to pack it anew, delete"):
        upload.begin("f", entries)
    files.pipe_file("/bucket/set/my file", b"")
    with pytest.raises(ShardError, match="holds other files, such as my file"):
        pack(images, bucket, _SMALL, scratch=tmp_path / "scratch")
    with pytest.raises(ShardError, match="cannot be written to; give a folder, or a URL such as s3"):
        pack(images, "http://127.0.0.1:1/set", _SMALL)
    closed = (tmp_path / "file").as_uri() + "/set"
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(RemoteFolder.__init__, "__defaults__", (RetryPolicy(0.2, 1.0, 0.01, 0.02),))
    with pytest.raises(ShardError, match=r"/set/packing\.jsonl cannot be written \(.*\); mend that and run this again"):
        pack(images, closed, _SMALL, scratch=tmp_path / "scratch")


@contextmanager
def _listing_server(root: Path) -> Iterator[str]:
    """A server that lists its folders as web pages with links."""

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


def _payloads(path: Path) -> list[bytes]:
    shard_set = ShardSet.open(path)
    return [shard_set.read(shard, sample) for shard, size in enumerate(shard_set.sizes) for sample in range(size)]


def test_folders_tars_and_lists_in_stores_pack_as_local_ones(tmp_path: Path, bucket: str) -> None:
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
            assert _payloads(out) == _payloads(tmp_path / "local"), source
            assert report.manifest.classes == ("a dog", "cat")
            assert sorted(path.name for path in out.iterdir()) == ["index", "manifest.json", "rejected.jsonl", "shards"]


def test_a_store_that_fails_stops_the_packing_and_a_vanished_object_does_not(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("memory")
    for number in range(4):
        files.pipe_file(f"/bucket/images/{number}.jpg", encoded(drawn_image(number)))
    eager = functools.partial(Store, patience=RetryPolicy(0.3, 1.0, 0.01, 0.02))
    monkeypatch.setattr(items, "store_at", eager)
    inner = type(files).cat_file

    def failing(self: object, path: str, *arguments: object, **options: object) -> bytes:
        if path.endswith("2.jpg"):
            raise failure
        return inner(self, path, *arguments, **options)

    monkeypatch.setattr(type(files), "cat_file", failing)
    failure: Exception = ConnectionError("the line is dead")
    with pytest.raises(ShardError, match=r"2\.jpg could not be read in .* the line is dead; once it can be read, run"):
        pack("memory://bucket/images", tmp_path / "set", _SMALL)
    failure = FileNotFoundError("gone")
    report = pack("memory://bucket/images", tmp_path / "set", _SMALL)
    assert (report.manifest.num_samples, report.num_rejected) == (3, 1)


def test_faults_of_a_remote_set_are_those_of_its_local_copy(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path, 40)
    path, url = shard_set.path, (tmp_path / "set").as_uri()
    assert verify(url) == verify(url, workers=2) == []
    with open(shard_set.tar_path(0), "r+b") as tar:
        tar.seek(int(shard_set.record(0, 3)["offset"]))
        tar.write(b"damage")
    tar_path = shard_set.tar_path(1)
    tar_path.write_bytes(tar_path.read_bytes()[:15_000])
    (path / "index" / "000000.idx").unlink()
    (path / "shards" / "left_over.tar").write_bytes(b"")
    expected = [(fault.file, fault.index, fault.key) for fault in verify(path)]
    assert [(fault.file, fault.index, fault.key) for fault in verify(url)] == expected
    assert ("shards/000000.tar", 3) in [(place, index) for place, index, _ in expected] and len(expected) > 5


def test_a_remote_set_without_one_of_its_tars_and_one_that_points_to_tars(tmp_path: Path) -> None:
    from shards.packing.index_tars import index_tars

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with tarfile.open(foreign / "a b.tar", "w") as tar:
        for number in range(3):
            header = tarfile.TarInfo(f"a b{number}.jpg")
            payload = encoded(drawn_image(number))
            header.size = len(payload)
            tar.addfile(header, io.BytesIO(payload))
    index_tars([(foreign / "a b.tar").as_uri().replace("%20", " ")], tmp_path / "adopted")
    assert len(load_index(tmp_path / "adopted" / "index" / "000000-a b.npy")) == 3
    assert verify(tmp_path / "adopted") == []
    (foreign / "a b.tar").unlink()
    (fault,) = verify(tmp_path / "adopted")
    assert fault.file == "shards/000000-a b.tar" and fault.reason.endswith("a b.tar does not exist")
