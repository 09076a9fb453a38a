"""Windows of an image: their pixels, the parts of the file that they decode, and files that are refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import drawn_pixels, saved
from PIL import Image

pytest.importorskip("tifffile")
import imagecodecs
import tifffile
from channel_images import ramp, tiff
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import SampleError, ShardError, SourceUnreachable
from shards.format import windows
from shards.format.decode import decode
from shards.format.pixels import RGB, PixelFormat

FOUR = PixelFormat(4, "uint16")
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"planarconfig": "separate", "rowsperstrip": 7},
    {"planarconfig": "separate", "tile": (16, 32)},
    {"tile": (16, 16), "compression": "zstd", "predictor": True},
    {"rowsperstrip": 16, "compression": "lzw", "byteorder": ">"},
)


def opened(payload: bytes, pixels: PixelFormat, max_pixels: int = 10**9) -> Any:
    return windows.open_image(len(payload), lambda begin, end: payload[begin:end], pixels, max_pixels)


def check_windows(payload: bytes, pixels: PixelFormat) -> Any:
    """Compare a few windows with the whole image."""
    whole, image = decode(payload, pixels=pixels), opened(payload, pixels)
    assert (image.height, image.width) == whole.shape[:2]
    for top, left, bottom, right in ((0, 0, 40, 32), (3, 5, 4, 6), (15, 15, 33, 32), (39, 0, 40, 32)):
        assert np.array_equal(image.read(top, left, bottom, right), whole[top:bottom, left:right])
    return image


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_windows_have_the_pixels_of_the_whole_image(tmp_path: Path, dtype: str) -> None:
    for channels in (1, 4):
        for form in FORMS:
            tiff(ramp(PixelFormat(channels, dtype)), tmp_path / "x.tif", **form)
            check_windows((tmp_path / "x.tif").read_bytes(), PixelFormat(channels, dtype))


def test_orientation_inverted_grey_and_packed_bits(tmp_path: Path) -> None:
    for turn in range(1, 9):
        size = {"height": 32, "width": 40} if turn > 4 else {}
        tiff(ramp(FOUR, **size), tmp_path / "x.tif", tile=(16, 16), extratags=[(274, "H", 1, turn, True)])
        check_windows((tmp_path / "x.tif").read_bytes(), FOUR)
    grey = ramp(PixelFormat(1, "uint8"))[..., 0]
    tifffile.imwrite(tmp_path / "i.tif", grey, photometric="miniswhite", tile=(16, 16))
    check_windows((tmp_path / "i.tif").read_bytes(), PixelFormat(1, "uint8"))
    deep = (ramp(PixelFormat(1, "uint16")) % 4096)[..., 0]
    tifffile.imwrite(tmp_path / "d.tif", deep, bitspersample=12, rowsperstrip=8, photometric="minisblack")
    check_windows((tmp_path / "d.tif").read_bytes(), PixelFormat(1, "uint16"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_equal_pages_are_channels(dtype: str) -> None:
    pixels, values = PixelFormat(4, dtype), ramp(PixelFormat(4, dtype))
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    for options in ({}, {"tile": (16, 16), "compression": "zlib"}, {"rowsperstrip": 7, "byteorder": ">"}):
        payload = written(planes, **options)
        assert np.array_equal(decode(payload, pixels=pixels), values)
        image = check_windows(payload, pixels)
        assert sum(part.size for part in image.parts()) == values.size
    others = [written(planes[:count]) for count in (2, 3)] + [written(np.concatenate([planes, planes]))]
    others += [written(planes[:1]), written(planes[0], *planes[1:, :20]), written(planes[0], *planes[1:].astype("f2"))]
    for payload, reason in zip(
        others, ["has 2 pages of 1 channel", "has 3 pages", "has more than 4 pages", f"it has 1 channel of {dtype}",
                 "page 2 differs from the first in size", "page 2 differs"], strict=True,
    ):  # fmt: skip
        for read in (decode, lambda payload, pixels: opened(payload, pixels)):
            with pytest.raises(ShardError, match=reason):
                read(payload, pixels=pixels)
    assert np.array_equal(decode(written(planes), pixels=PixelFormat(1, dtype)), values[..., :1])


def written(*pages: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, byteorder=options.pop("byteorder", "<")) as file:
        for page in pages:
            file.write(page, photometric="minisblack", metadata=None, **options)
    return buffer.getvalue()


def test_rgb_is_read_by_windows_where_no_conversion_is_needed(tmp_path: Path) -> None:
    values = ramp(RGB)
    for options in ({}, {"compression": "zlib"}, {"compression": "jpeg"}, {"compression": "webp"}):
        tifffile.imwrite(tmp_path / "x.tif", values, photometric="rgb", tile=(16, 16), **options)
        image = opened((tmp_path / "x.tif").read_bytes(), RGB, max_pixels=1)
        difference = np.abs(image.read(0, 0, 40, 32).astype(int) - values)
        assert difference.max() == 0 or options.get("compression") in ("jpeg", "webp")
    for mode in ("L", "P", "1", "CMYK", "RGBA"):
        payload = saved(Image.fromarray(drawn_pixels(3)[:40, :32]).convert(mode), "TIFF")
        assert not hasattr(check_windows(payload, RGB), "num_decoded")
        with pytest.raises(ShardError, match="more than 100 pixels"):
            opened(payload, RGB, max_pixels=100)
    for kind in ("JPEG", "PNG"):
        check_windows(saved(Image.fromarray(drawn_pixels(3)[:40, :32]), kind), RGB)


def test_only_the_parts_of_a_window_are_read_and_decoded(tmp_path: Path) -> None:
    values = np.zeros((2048, 2048, 3), np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="rgb", tile=(128, 128))
    payload, num_read = (tmp_path / "x.tif").read_bytes(), 0

    def read(begin: int, end: int) -> bytes:
        nonlocal num_read
        num_read += end - begin
        return payload[begin:end]

    image: Any = windows.open_image(len(payload), read, RGB, 10**9)
    assert num_read < 200_000
    num_read = 0
    image.read(100, 100, 300, 200)
    assert image.num_decoded == 6 and num_read == 6 * 128 * 128 * 3
    image.read(120, 120, 128, 130)
    assert image.num_decoded == 6


def test_tiles_of_many_channels_are_read() -> None:
    pixels = PixelFormat(512, "uint16")
    values = np.arange(64 * 64 * 512, dtype=np.uint16).reshape(64, 64, 512)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, photometric="minisblack", planarconfig="contig", tile=(64, 64))
    assert np.array_equal(decode(buffer.getvalue(), pixels=pixels), values)
    assert np.array_equal(opened(buffer.getvalue(), pixels).read(8, 9, 10, 11), values[8:10, 9:11])


@pytest.mark.parametrize("error", [SourceUnreachable("no route to host"), SampleError("a.tar", 0, "x", "cut off")])
def test_failed_reads_of_tags_are_not_taken_for_another_format(error: ShardError) -> None:
    def read(begin: int, end: int) -> bytes:
        if end > 4:
            raise error
        return b"II*\0"

    with pytest.raises(type(error)):
        windows.open_tiff(10_000, read, RGB)


def test_memory_is_bounded_by_the_kept_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_KEPT_BYTES", 10_000)
    tiff(ramp(FOUR, height=512), tmp_path / "x.tif", rowsperstrip=8)
    image = opened((tmp_path / "x.tif").read_bytes(), FOUR)
    image.read(0, 0, 512, 32)
    assert image.num_decoded == 64 and sum(each.nbytes for each in image._kept.values()) <= 10_000


def test_hostile_parts_are_refused(tmp_path: Path) -> None:
    values = ramp(RGB)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, values, photometric="rgb", tile=(16, 16), compression="jpeg")
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        offsets, counts = page.dataoffsets, page.databytecounts
        where = {name: page.tags[name].valueoffset for name in ("TileOffsets", "TileByteCounts")}
        kinds = {name: page.tags[name].dtype for name in where}
    whole = path.read_bytes()
    bomb = imagecodecs.jpeg_encode(np.zeros((4000, 4000, 3), np.uint8))

    def changed(offset: int, count: int) -> bytes:
        payload = bytearray(whole + bytes(bomb))
        for name, value in (("TileOffsets", offset), ("TileByteCounts", count)):
            size = {3: 2, 4: 4, 16: 8}[int(kinds[name])]
            payload[where[name] : where[name] + size] = value.to_bytes(size, "little")
        return bytes(payload)

    assert opened(changed(offsets[0], counts[0]), RGB).read(0, 0, 16, 16).shape == (16, 16, 3)
    with pytest.raises(ShardError, match=r"pixels need|4000x4000 pixels, more than its tags say"):
        opened(changed(len(whole), min(len(bomb), 65_000)), RGB).read(0, 0, 16, 16)
    with pytest.raises(ShardError, match="truncated, or tiles are missing"):
        opened(changed(len(whole) + len(bomb), 100), RGB)
    with pytest.raises(ShardError, match="tiles are missing"):
        opened(changed(0, 0), RGB)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((64, 64), np.float32), photometric="minisblack", rowsperstrip=8)
    repeated = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(repeated)) as file:
        tag = file.pages.first.tags["StripByteCounts"]
        at, size = tag.valueoffset, {3: 2, 4: 4}[int(tag.dtype)]
    for number in range(8):
        repeated[at + number * size : at + number * size + size] = (2048 * (8 - number)).to_bytes(size, "little")
    with pytest.raises(ShardError, match="overlap"):
        opened(bytes(repeated), PixelFormat(1, "float32"))


def test_tables_of_a_billion_parts_are_refused() -> None:
    tags = [(256, 4, 1, 4), (257, 4, 1, 1 << 30), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
            (273, 16, 1 << 30, 1000), (277, 3, 1, 1), (278, 4, 1, 1), (279, 16, 1 << 30, 1000)]  # fmt: skip
    head = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(tags)) + b"".join(struct.pack("<HHQQ", *tag) for tag in tags)
    num_read = 0

    def read(begin: int, end: int) -> bytes:
        nonlocal num_read
        num_read += end - begin
        return head[begin:end].ljust(end - begin, b"\0")

    with pytest.raises(ShardError):
        windows.open_image(40 << 30, read, PixelFormat(1, "uint8"), 10**9)
    assert num_read < 1 << 28


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_a_window_or_one_line(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([{"tile": (16, 16)}, {"rowsperstrip": 8}]))
    compression = data.draw(st.sampled_from(["zlib", "jpeg", None]))
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, ramp(RGB), photometric="rgb", compression=compression, **form)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    try:
        image = opened(payload, RGB, max_pixels=1 << 16)
        assert image.read(0, 0, min(20, image.height), min(20, image.width)).dtype == np.uint8
    except ShardError as error:
        assert "\n" not in str(error)
