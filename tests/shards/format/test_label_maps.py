"""Masks and depth maps: stored values, marks of unlabelled pixels, and refusals."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from drawn_images import drawn_image, encoded
from PIL import Image

from shards.errors import ShardError
from shards.format.label_maps import decode_class_ids, decode_depth

IDS = np.array([[0, 1, 3], [2, 0, 1]])


def png(values: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    if mode == "P":
        image = Image.new("P", values.shape[::-1])
        image.putdata(values.ravel().tolist())
        image.putpalette(bytes(range(100, 255)) + bytes(613))
    else:
        image = Image.fromarray(values)
    image.save(file, "PNG", **options)
    return file.getvalue()


def npy(values: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=allow_pickle)
    return file.getvalue()


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """Return a grey PNG of few bits a pixel, which Pillow writes only with a palette."""
    payload = bytearray(png(values, "P", bits=bits))
    start = payload.index(b"PLTE") - 4
    length = int.from_bytes(payload[start : start + 4], "big")
    del payload[start : start + length + 12]
    assert payload[24] == bits and payload[25] == 3
    payload[25] = 0
    payload[29:33] = zlib.crc32(payload[12:29]).to_bytes(4, "big")
    return bytes(payload)


@pytest.mark.parametrize(
    "payload",
    [
        png(IDS.astype(np.uint8)), png(IDS.astype(np.uint16)), png(IDS, "P"), png(IDS, "P", bits=4),
        grey_png(IDS, 2), grey_png(IDS, 4),
    ],
)  # fmt: skip
def test_class_ids_are_the_stored_values_or_palette_indices(payload: bytes) -> None:
    np.testing.assert_array_equal(decode_class_ids(payload), IDS)


def test_the_largest_value_is_unlabelled() -> None:
    assert decode_class_ids(png(np.array([[255, 254]], np.uint8))).tolist() == [[-1, 254]]
    assert decode_class_ids(png(np.array([[255, 65535]], np.uint16))).tolist() == [[255, -1]]
    assert decode_class_ids(png(np.array([[True, False]]))).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (encoded(drawn_image(0), "PNG"), "picture in colour"),
        (encoded(drawn_image(0).convert("L"), "JPEG"), "must be a PNG$"),
        (b"ids", "must be a PNG$"),
        (png(np.array([[1024]], np.uint16)), "largest possible is 1023"),
        (png(IDS.astype(np.uint8))[:-20], "."),
        (b"", "empty"),
    ],
)
def test_other_files_are_not_masks(payload: bytes, words: str) -> None:
    with pytest.raises(ShardError, match=words):
        decode_class_ids(payload)


def test_too_many_pixels_are_refused() -> None:
    with pytest.raises(ShardError, match="more than 5 pixels"):
        decode_class_ids(png(IDS.astype(np.uint8)), max_pixels=5)
    with pytest.raises(ShardError, match="more than 5 pixels"):
        decode_depth(npy(np.ones((2, 3), np.float32)), max_pixels=5)


def test_depth_is_in_metres_and_0_where_unknown() -> None:
    stored = np.array([[1.5, 0.0, -2.0], [np.nan, np.inf, 3.0]], np.float32)
    assert decode_depth(npy(stored)).tolist() == [[1.5, 0, 0], [0, 0, 3]]
    depth = decode_depth(png(np.array([[1500, 0]], np.uint16)))
    assert depth.dtype == np.float32 and depth.tolist() == [[1.5, 0]]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (npy(np.ones((2, 3))), "an array of float64 is not supported; convert it to float32$"),
        (npy(np.ones((2, 3), np.uint16)), "convert it to float32$"),
        (b"depth", "depth must be a .npy or a PNG$"),
        (npy(np.ones((2, 3, 4, 5), np.float32)), "shape"),
        (npy(np.array([[{}]]), allow_pickle=True), "object"),
        (npy(np.ones((2, 3), np.float32))[:-1], "promises"),
        (png(IDS.astype(np.uint8)), "16 bits"),
    ],
)
def test_other_files_are_not_depth(payload: bytes, words: str) -> None:
    with pytest.raises(ShardError, match=words):
        decode_depth(payload)
