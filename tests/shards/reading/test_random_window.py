"""Windows of large images: bounds, uniform positions, and reading them from a set."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_images import drawn_image, encoded

pytest.importorskip("tifffile")
import tifffile

from shards.errors import SampleError, ShardError
from shards.format.pixels import PixelFormat
from shards.packing.index_tars import index_tars
from shards.reading import local_files
from shards.reading.order import Order
from shards.reading.quarantine import Quarantine
from shards.reading.random_window import RandomWindow
from shards.reading.shard_set import ShardSet
from shards.reading.source import Samples, Source

GREY = PixelFormat(1, "uint8")


def test_windows_are_inside_uniform_and_depend_on_the_slot_alone() -> None:
    window = RandomWindow(4, seed=3)
    assert window.applies_to(5, 1) and window.applies_to(1, 5) and not window.applies_to(4, 4)
    boxes = [window.draw(slot, 6, 9) for slot in range(4000)]
    assert boxes[17:20] == [window.draw(slot, 6, 9) for slot in (17, 18, 19)]
    assert all(bottom - top == 4 and right - left == 4 for top, left, bottom, right in boxes)
    counts = Counter((top, left) for top, left, _, _ in boxes)
    assert sorted(counts) == [(top, left) for top in range(6) for left in range(3)]
    assert min(counts.values()) > 150 and max(counts.values()) < 300  # 222 on average
    assert window.draw(7, 3, 9)[1::2] == (0, 3)
    assert RandomWindow(4, seed=4).draw(0, 600, 900) != window.draw(0, 600, 900)


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., ShardSet]:
    """Return a function that indexes a tar of image files."""

    def index(payloads: dict[str, bytes], pixels: PixelFormat = GREY) -> ShardSet:
        with tarfile.open(tmp_path / "images.tar", "w") as tar:
            for name, payload in payloads.items():
                info = tarfile.TarInfo(name)
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        index_tars([str(tmp_path / "images.tar")], tmp_path / "set", pixels=pixels)
        return ShardSet.open(tmp_path / "set")

    return index


def tiff(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="minisblack", **{"tile": (64, 64), **options})
    return buffer.getvalue()


def read(shard_set: ShardSet, log: Path | None = None, **options: Any) -> Samples:
    """Return the samples of the first 16 slots, with windows of 48 pixels."""
    quarantine = None if log is None else Quarantine(log)
    source = Source(
        shard_set, Order(shard_set.sizes, 0), threads=2, quarantine=quarantine, window=RandomWindow(48, 7), **options
    )
    with closing(source):
        return next(source.batches([np.arange(16)]))


def test_only_the_window_of_a_larger_tiff_is_read(
    make_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(1024 * 768, dtype=np.uint32).view(np.uint8).reshape(1024, 3072)[:, ::4].copy()
    small, picture = np.full((40, 48), 9, np.uint8), encoded(drawn_image(1, 60, 50).convert("L"), "PNG")
    shard_set = make_set({"a.tif": tiff(values), "b.tif": tiff(small), "c.png": picture})
    num_bytes, pread = [], local_files._pread
    monkeypatch.setattr(
        local_files, "_pread", lambda file, length, offset: num_bytes.append(length) or pread(file, length, offset)
    )
    batch = read(shard_set, max_pixels=64 * 64)
    assert sorted(set(batch.samples.tolist())) == [0, 1, 2]
    for row, (slot, sample) in enumerate(zip(batch.slots.tolist(), batch.samples.tolist(), strict=True)):
        if sample:
            assert row not in batch.windows and batch.payloads[row].tobytes() == shard_set.read(0, sample)
            continue
        top, left, bottom, right = RandomWindow(48, 7).draw(slot, 768, 1024)
        assert np.array_equal(batch.windows[row][..., 0], values[top:bottom, left:right])
    # tags, at most four tiles, and the small files
    assert max(num_bytes) <= max(64 * 64, len(picture), len(tiff(small)), 16_384)
    with pytest.raises(SampleError, match="tiles or strips of 64x64 are more than 4095 pixels"):
        read(shard_set, max_pixels=64 * 64 - 1)


def patched(payload: bytes, **tags: int) -> bytes:
    """Return a TIFF with other values of some tags, without their checks."""
    changed = bytearray(payload)
    with tifffile.TiffFile(io.BytesIO(payload)) as file:
        for name, value in tags.items():
            tag = file.pages.first.tags[name]
            size = {3: 2, 4: 4}[int(tag.dtype)]
            for at in range(tag.valueoffset, tag.valueoffset + size * tag.count, size):
                changed[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(changed)


def test_hostile_files_are_skipped_and_logged(make_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
    plain, packed = tiff(noise), tiff(noise, compression="zlib")
    bomb = zlib.compress(bytes(1 << 26))
    good = {f"good{number}.tif": tiff(np.full((100, 100), 7, np.uint8)) for number in range(5)}
    hostile = {
        "huge": (patched(plain, TileWidth=65_520, TileLength=65_520), "65520x65520 samples are too large"),
        "negative": (patched(plain, TileWidth=-64), "samples are too large"),
        "zero": (patched(plain, TileWidth=0), ""),
        "overlap": (patched(packed, TileOffsets=len(packed) - 9000, TileByteCounts=9000), "overlap in the file"),
        "outside": (patched(plain, TileOffsets=len(plain)), "truncated, or tiles are missing"),
        "bomb": (
            patched(packed, TileOffsets=len(packed), TileByteCounts=len(bomb) // 16) + bomb,
            "libdeflate|more than its pixels need",
        ),
        "damaged": (patched(packed, TileOffsets=8), "libdeflate"),
    }
    for name, (payload, reason) in hostile.items():
        shard_set = make_set({f"{name}.tif": payload, **good})
        batch = read(shard_set, tmp_path / f"{name}.jsonl")
        assert all((values == 7).all() for values in batch.windows.values()) and len(batch.windows) == 16
        entries = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert {entry["key"] for entry in entries} == {name}
        assert all(re.search(reason, entry["reason"]) and "\n" not in entry["reason"] for entry in entries), entries


def test_failed_reads_cost_an_image_but_a_missing_shard_ends_the_run(
    make_set: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (1024, 1024), np.uint8)
    shard_set, pread = make_set({"a.tif": tiff(values, tile=(64, 80))}), local_files._pread

    def fail(file: int, length: int, offset: int) -> bytes:
        if length == 64 * 80:
            raise OSError(errno.EIO, "Input/output error")
        return pread(file, length, offset)

    monkeypatch.setattr(local_files, "_pread", fail)
    with pytest.raises(SampleError, match=r"key 'a'\): cannot be read \(Input/output error\)"):
        read(shard_set)
    monkeypatch.setattr(local_files, "_pread", pread)
    local_files._open_files.close_half()
    (shard_set.tar_path(0)).unlink()
    with pytest.raises(ShardError, match="is gone; restore it and re-run") as error:
        read(ShardSet(shard_set.path, shard_set.manifest))
    assert not isinstance(error.value, SampleError)


def test_an_index_without_checksums_is_compared_with_the_tar(make_set: Callable[..., ShardSet]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (100, 100), np.uint8)
    shard_set = make_set({"a.tif": tiff(values), "b.tif": tiff(values[::-1])})
    records = np.array(shard_set.records(0))
    np.save(shard_set.index_path(0), records)
    assert len(read(ShardSet.open(shard_set.path)).windows) == 16
    records["length"][0] -= 16  # of padding
    np.save(shard_set.index_path(0), records)
    with pytest.raises(SampleError, match=r"key 'a'.*the header before it in the tar is damaged"):
        read(ShardSet.open(shard_set.path))
