"""Existing tars are indexed in place, local or remote."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from drawn_images import add_to_tar, all_labels, drawn_image, encoded, packed_set
from faulty_server import faulty_server

from shards.errors import ShardError
from shards.format.decode import DEFAULT_MAX_PIXELS
from shards.format.pixels import PixelFormat
from shards.packing.index_tars import index_tars
from shards.packing.verify import verify
from shards.reading.order import Order
from shards.reading.shard_set import ShardSet
from shards.reading.source import Source
from shards.storage.store import RetryPolicy

_ROOT = Path(__file__).resolve().parents[3]


def _foreign_tar(path: Path, first: int, count: int) -> None:
    """Write a tar with webdataset, with a caption for each image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(first, first + count):
            writer.write(
                {
                    "__key__": f"größe/{number:04d}",
                    "txt": b"a caption",
                    "png" if number % 2 else "jpeg": encoded(drawn_image(number), "PNG" if number % 2 else "JPEG"),
                    "cls": str(number).encode(),
                }
            )


@pytest.mark.parametrize("workers", [1, 2])
def test_tars_with_the_same_name_are_separate_shards(tmp_path: Path, workers: int) -> None:
    for number, folder in enumerate("ab"):
        _foreign_tar(tmp_path / folder / "000.tar", 10 * number, 10)
    report = index_tars([str(tmp_path / "a"), str(tmp_path / "b" / "*.tar")], tmp_path / "set", workers=workers)
    assert (report.num_unreadable, report.without_dali, report.empty) == (0, (), ())
    shard_set = ShardSet.open(tmp_path / "set")
    assert [entry.name for entry in shard_set.manifest.shards] == ["000000-000.tar", "000001-000.tar"]
    source = Source(shard_set, Order(shard_set.sizes, seed=1))
    batch = next(source.batches([np.arange(20)]))
    source.close()
    assert sorted(batch.labels.tolist()) == list(range(20))
    for label, payload in zip(batch.labels, batch.payloads, strict=True):
        image = drawn_image(int(label))
        assert payload.tobytes() == encoded(image, "PNG" if label % 2 else "JPEG")
    assert verify(tmp_path / "set") == []


def test_report_of_spaces_unreadable_images_and_empty_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, content in [("a b.jpg", encoded(drawn_image(1))), ("c.jpg", b"not an image")]:
            add_to_tar(tar, name, content)
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"))
    report = index_tars([str(tmp_path)], tmp_path / "set")
    assert report.num_unreadable == 1
    assert "a b.jpg" in report.without_dali[0]
    assert [Path(url).name for url in report.empty] == ["texts.tar"]
    assert ShardSet.open(tmp_path / "set").num_samples == 2


def test_remote_stream_equals_local_stream_despite_faults(tmp_path: Path) -> None:
    local = packed_set(tmp_path, 40, ("cat", "dog"))
    _foreign_tar(tmp_path / "foreign" / "000.tar", 0, 10)
    policy = RetryPolicy(20.0, 1.0, 0.01, 0.05)

    def stream(shard_set: ShardSet) -> list[tuple[int, int, bytes]]:
        source = Source(shard_set, Order(shard_set.sizes, seed=3, window=2, lanes=4), threads=3)
        batches = list(source.batches(np.arange(at, at + 8) for at in range(0, 40, 8)))
        source.close()
        return [
            (int(batch.shards[row]), int(batch.samples[row]), payload.tobytes())
            for batch in batches
            for row, payload in enumerate(batch.payloads)
        ]

    with faulty_server(tmp_path) as server:
        server.faults = ["503", "cut", None, "short", None, "503", None, "stall", None, None, "whole", "cut"]
        remote = ShardSet.open(f"{server.url}/set", policy)
        assert remote.digest == local.digest
        assert stream(remote) == stream(local)
        assert len(server.faults) == 0

        index_tars([f"{server.url}/foreign/000.tar"], tmp_path / "indexed")
        indexed = ShardSet.open(tmp_path / "indexed")
        assert indexed.manifest.shards[0].url == f"{server.url}/foreign/000.tar"
        assert indexed.read(0, 3) == encoded(drawn_image(3), "PNG")
        assert sorted(path.name for path in (tmp_path / "indexed").iterdir()) == ["index", "manifest.json"]

        with pytest.raises(ShardError, match=r"/nothing/manifest\.json does not exist"):
            ShardSet.open(f"{server.url}/nothing", policy)


def test_command_prints_errors_in_one_line(tmp_path: Path) -> None:
    tool = [sys.executable, str(_ROOT / "tools" / "index_shards.py"), "--workers", "1", "--out", str(tmp_path / "set")]
    _foreign_tar(tmp_path / "good.tar", 0, 3)
    (tmp_path / "bad.tar").write_bytes((tmp_path / "good.tar").read_bytes()[:3000])
    (tmp_path / "good.tar.gz").write_bytes(gzip.compress((tmp_path / "good.tar").read_bytes()))
    (tmp_path / "good.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (tmp_path / "packed").mkdir()
    packed_set(tmp_path / "packed", 2)
    for source, message in [
        ("nowhere", "does not exist"),
        ("pipe:cat good.tar", "pipe: runs shell commands"),
        (str(tmp_path / "bad.tar"), "bad.tar is"),
        ("", "--src is empty"),
        ("good.tar.gz", "good.tar.gz is compressed, so single images cannot be read; use streamtrain pack"),
        ("file:///nowhere/good.tar.gz", "good.tar.gz is compressed"),
        ("good.tar.zst", "zstd is not supported"),
        ("packed/set", "packed/set already is a shard set"),
        ((tmp_path / "packed" / "set").as_uri(), "already is a shard set"),
        (str(tmp_path / "good.tar"), ""),
    ]:
        ended = subprocess.run([*tool, "--src", source], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert ended.returncode == (2 if message else 0), ended
        assert message in ended.stderr and "Traceback" not in ended.stderr
        if not message:
            assert "indexed 3 images in 1 shard," in ended.stdout
    ended = subprocess.run([*tool[:-1], "", "--src", "good.tar"], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (2, "error: --out is empty; give the folder of the set\n")


def test_images_that_only_windows_can_read_are_indexed(tmp_path: Path) -> None:
    tifffile, side = pytest.importorskip("tifffile"), 14_000
    assert side**2 > DEFAULT_MAX_PIXELS
    tile = np.zeros((2000, 2000), np.uint8)
    tifffile.imwrite(
        tmp_path / "x.tif", (tile for _ in range(49)), shape=(side, side), dtype=tile.dtype, tile=tile.shape[::-1],
        compression="zlib",
    )  # fmt: skip
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "x.tif", "x.tif")
    assert index_tars([str(tmp_path / "x.tar")], tmp_path / "set", pixels=PixelFormat(1)).num_unreadable == 0
    with pytest.raises(ShardError, match="none of the 1 image tried can be decoded as 2 channels of uint8"):
        index_tars([str(tmp_path / "x.tar")], tmp_path / "other", pixels=PixelFormat(2))


def test_command_prints_what_it_passes_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in [
            *((f"IMG.{number}.jpg", encoded(drawn_image(number))) for number in range(3)),
            *((f"IMG.{number}.cls", str(number).encode()) for number in (2, 0)),
            ("a.jpg", encoded(drawn_image(3))),
            ("a.png", encoded(drawn_image(3), "PNG")),
            ("b.gif", encoded(drawn_image(4), "GIF")),
        ]:
            add_to_tar(tar, name, content)
    done = subprocess.run(
        [
            sys.executable,
            str(_ROOT / "tools" / "index_shards.py"),
            "--src",
            tmp_path / "x.tar",
            "--out",
            tmp_path / "set",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "files of other kinds, passed over: .gif 1",
        "images without a label of their name: 2",
        "second images of a sample, passed over: 1",
    ]
    assert lines[-1].startswith("indexed 4 images in 1 shard")
    shard_set = ShardSet.open(tmp_path / "set")
    assert all_labels(shard_set) == [0, -1, 2, -1]
    assert [shard_set.key(0, sample) for sample in range(4)] == ["IMG.0", "IMG.1", "IMG.2", "a"]
    assert verify(tmp_path / "set") == []
