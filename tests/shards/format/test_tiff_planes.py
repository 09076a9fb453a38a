"""TIFF files of kinds that Pillow decodes to wrong pixels: separate planes, and signed samples."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from shards.errors import ShardError
from shards.format.decode import decode

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2


def make_tiff(pixels: np.ndarray, photometric: int, *, planes: int = 1, signed: bool = False) -> bytes:
    """Return an uncompressed TIFF of pixels [height, width, samples], with contiguous or separate planes."""
    height, width, samples = pixels.shape
    bits = pixels.dtype.itemsize * 8
    strips = [pixels[..., n] for n in range(samples)] if planes == 2 else [pixels]
    data = [np.ascontiguousarray(strip).tobytes() for strip in strips]
    extra, entries = b"", []
    num_entries = 11
    start = 8 + 2 + 12 * num_entries + 4

    def add(tag: int, kind: str, *values: int) -> None:
        nonlocal extra
        content = struct.pack(f"<{len(values)}{kind}", *values)
        if len(content) > 4:
            offset, extra = start + len(extra), extra + content
            content = struct.pack("<I", offset)
        entries.append(struct.pack("<HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + content.ljust(4, b"\0"))

    # the offsets follow from the length of the values that lie outside the directory
    lengths = [len(part) for part in data]
    outside = 2 * (2 * samples if 2 * samples > 4 else 0) + 2 * (4 * len(data) if len(data) > 1 else 0)
    offsets = [start + outside + sum(lengths[:n]) for n in range(len(data))]
    add(256, "I", width)
    add(257, "I", height)
    add(258, "H", *[bits] * samples)
    add(259, "H", 1)
    add(262, "H", photometric)
    add(273, "I", *offsets)
    add(277, "H", samples)
    add(278, "I", height)
    add(279, "I", *lengths)
    add(284, "H", planes)
    add(339, "H", *[2 if signed else 1] * samples)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + extra + b"".join(data)


def draw(samples: int, kind: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(kind).max, (5, 7, samples), kind)


@pytest.mark.parametrize("planes", [1, 2])
def test_planes_of_8_bits_and_one_plane_of_any_kind(planes: int) -> None:
    colors, grey = draw(3), draw(1)
    np.testing.assert_array_equal(decode(make_tiff(colors, RGB, planes=planes)), colors)
    np.testing.assert_array_equal(decode(make_tiff(grey, BLACK_IS_ZERO, planes=planes)), grey.repeat(3, -1))
    np.testing.assert_array_equal(decode(make_tiff(grey, WHITE_IS_ZERO, planes=planes)), 255 - grey.repeat(3, -1))
    wide = draw(1, np.uint16)
    expected = ((wide.astype(np.uint32) * 255 + 32767) // 65535).repeat(3, -1)
    np.testing.assert_array_equal(decode(make_tiff(wide, BLACK_IS_ZERO, planes=planes)), expected)


def test_16_bits_in_separate_planes_are_refused() -> None:
    wide = draw(3, np.uint16)
    expected = (wide.astype(np.uint32) * 255 + 32767) // 65535
    np.testing.assert_array_equal(decode(make_tiff(wide, RGB)), expected)
    with pytest.raises(ShardError, match="16 bits in separate planes"):
        decode(make_tiff(wide, RGB, planes=2))


def test_signed_samples_are_refused() -> None:
    with pytest.raises(ShardError, match="signed"):
        decode(make_tiff(draw(1), BLACK_IS_ZERO, signed=True))
