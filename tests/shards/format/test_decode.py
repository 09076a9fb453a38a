"""The decoder's laws: one rule for depth, alpha and orientation; any bytes end in pixels or a ShardError, in time."""

from __future__ import annotations

import contextlib
import re
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import drawn_pixels, image_files, png, png_chunk, saved, tiff16
from PIL import Image

from shards.errors import ShardError
from shards.format.decode import decode, turn_upright
from shards.format.image_header import MAX_SCANS, read_header

FILES = image_files()


@pytest.mark.parametrize("color", [0, 2, 4, 6])
def test_an_image_looks_the_same_in_16_bits_as_in_8(color: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    narrow = drawn_pixels(channels)
    np.testing.assert_array_equal(decode(png(narrow.astype(np.uint16) * 257, color, 16)), decode(png(narrow, color, 8)))


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_are_rounded_to_nearest(order: str) -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.stack([deep, deep[::-1], deep.T], -1)
    for payload in (tiff16(pixels, order), png(pixels, 2, 16)):
        np.testing.assert_array_equal(decode(payload), np.rint(pixels / 257))


def test_orientations_are_those_of_exif() -> None:
    upright = decode(FILES["PNG orientation 1"])
    methods = Image.Transpose
    turns = {2: methods.FLIP_LEFT_RIGHT, 3: methods.ROTATE_180, 4: methods.FLIP_TOP_BOTTOM, 5: methods.TRANSPOSE,
             6: methods.ROTATE_270, 7: methods.TRANSVERSE, 8: methods.ROTATE_90}  # fmt: skip
    for orientation, method in turns.items():
        expected = np.asarray(Image.fromarray(upright).transpose(method))
        np.testing.assert_array_equal(turn_upright(upright, orientation), expected)
        np.testing.assert_array_equal(decode(FILES[f"PNG orientation {orientation}"]), expected)
        np.testing.assert_array_equal(decode(FILES[f"TIFF orientation {orientation}"]), expected)


@settings(max_examples=600, deadline=5000)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_any_bytes_give_pixels_of_the_size_in_the_header_or_a_shard_error(name: str, data: st.DataObject) -> None:
    payload = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(payload) - 1, data.draw(st.sampled_from([60, 10_000])))))
        piece = data.draw(st.binary(min_size=0, max_size=4))
        payload[at : at + data.draw(st.sampled_from([0, len(piece), 40]))] = piece
        payload = payload or bytearray(b"\0")
    try:
        header = read_header(bytes(payload))
        pixels = decode(bytes(payload), max_pixels=1 << 20)
    except ShardError as error:
        # no address of an object
        assert "\n" not in str(error) and not re.search(r"\b0x", str(error))
        return
    assert pixels.shape == (header.height, header.width, 3) and pixels.dtype == np.uint8


def test_hostile_structures_take_linear_time() -> None:
    jpeg = saved(Image.fromarray(drawn_pixels(3)), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    start = time.process_time()
    with pytest.raises(ShardError, match=f"more than {MAX_SCANS} scans"):
        decode(jpeg[:-2] + scan * 3000 + b"\xff\xd9")
    for junk in (b"\xff" * 2_000_000, b"\xff\xfe\0\x02" * 300_000, b"\xff\xda" * 500_000, b"\xff\0" * 500_000):
        for payload in (jpeg[:2] + junk + jpeg[2:], jpeg[: len(jpeg) // 2] + junk + b"\xff\xd9"):
            with contextlib.suppress(ShardError):
                decode(payload)
    with pytest.raises(ShardError, match="chunks"):
        read_header(png(drawn_pixels(3), 2, 8, bytes(4) + b"".join([b"aaAa\0\0\0\0\0\0\0\0"] * 300_000)))
    assert time.process_time() - start < 10


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("color", "depth"), [(0, 1), (0, 8), (0, 16), (2, 8), (2, 16), (3, 4), (4, 8), (4, 16), (6, 8), (6, 16)]
)
def test_a_png_without_its_last_rows_is_refused(color: int, depth: int, interlaced: bool) -> None:
    width, height, samples = 13, 9, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    grids = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = []
    for left, top, across, down in grids if interlaced else ((0, 0, 1, 1),):
        columns = len(range(left, width, across))
        rows += [bytes(1 + -(-columns * samples * depth // 8)) for _ in range(top, height, down) if columns]
    palette = png_chunk(b"PLTE", bytes(48)) if color == 3 else b""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced))

    def file(rows: list[bytes]) -> bytes:
        data = png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
        return b"\x89PNG\r\n\x1a\n" + header + palette + data + png_chunk(b"IEND", b"")

    assert decode(file(rows)).shape == (height, width, 3)  # black is no fault
    for kept in (0, 1, len(rows) - 1):
        with pytest.raises(ShardError, match=r"end before|truncated|broken|damaged|cannot"):
            decode(file(rows[:kept]))
