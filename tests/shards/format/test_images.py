"""Images are stored only if they decode in full, unchanged if DALI can decode them."""

from __future__ import annotations

import io
import re
import struct

import numpy as np
import pytest
from drawn_images import drawn_image, encoded
from PIL import Image

from shards.errors import ShardError
from shards.format.decode import decode
from shards.format.image_header import read_header
from shards.format.images import prepare


@pytest.mark.parametrize(
    ("kind", "mode", "extension"),
    [
        ("JPEG", "RGB", "jpg"),
        ("JPEG", "CMYK", "jpg"),
        ("JPEG", "L", "jpg"),
        ("PNG", "RGBA", "png"),
        ("PNG", "P", "png"),
        ("WEBP", "RGB", "webp"),
        ("TIFF", "RGB", "tif"),
    ],
)
def test_formats_that_dali_decodes_are_stored_unchanged(kind: str, mode: str, extension: str) -> None:
    payload = encoded(drawn_image(3).convert(mode), kind)
    prepared = prepare(payload)
    assert (prepared.payload, prepared.extension, prepared.width, prepared.height) == (payload, extension, 40, 30)


@pytest.mark.parametrize(("kind", "mode"), [("GIF", "P"), ("BMP", "RGB"), ("TIFF", "1"), ("TIFF", "CMYK")])
def test_other_formats_become_png_without_loss(kind: str, mode: str) -> None:
    image = drawn_image(3).convert(mode)
    prepared = prepare(encoded(image, kind))
    assert prepared.extension == "png"
    stored = Image.open(io.BytesIO(prepared.payload))
    np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), np.asarray(image.convert("RGB")))


def test_sixteen_bit_tiffs_are_scaled_not_clipped() -> None:
    deep = (np.arange(1200, dtype=np.uint16) * 54).reshape(30, 40)
    prepared = prepare(encoded(Image.fromarray(deep), "TIFF"))
    expected = np.rint(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(prepared.payload))), expected)


def test_large_images_shrink_and_small_ones_stay() -> None:
    large, small = encoded(drawn_image(1, 400, 100)), encoded(drawn_image(1, 100, 90))
    assert (prepare(large, max_side=100).width, prepare(large, max_side=100).height) == (100, 25)
    assert prepare(small, max_side=100).payload == small


def test_orientation_is_kept_or_applied() -> None:
    exif = drawn_image(1).getexif()
    exif[0x0112] = 6
    payload = encoded(drawn_image(1, 40, 30), exif=exif)
    kept, applied = prepare(payload), prepare(payload, upright=True)
    assert kept.payload == payload
    assert (kept.width, kept.height) == (applied.width, applied.height) == (30, 40)
    assert Image.open(io.BytesIO(applied.payload)).size == (30, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("keep", [0, 0.05, 0.5, 0.95])
def test_truncated_images_are_rejected(kind: str, keep: float) -> None:
    payload = encoded(drawn_image(1, 300, 200), kind)
    with pytest.raises(ShardError):
        prepare(payload[: int(len(payload) * keep)])


def test_reasons_for_rejection() -> None:
    with pytest.raises(ShardError, match="not an image"):
        prepare(b"just text")
    with pytest.raises(ShardError, match="40x30 is more than 1000 pixels"):
        prepare(encoded(drawn_image(1)), max_pixels=1000)
    with pytest.raises(ShardError, match="no defined white"):
        prepare(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    with pytest.raises(ShardError, match="pack with --max-side"):
        prepare(encoded(Image.new("L", (70_000, 1)), "PNG"))


def _with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Return a JPEG whose header states another size than its data have."""
    frame = re.search(rb"\xff[\xc0\xc2]..\x08", jpeg, re.DOTALL)
    assert frame is not None
    return jpeg[: frame.end()] + struct.pack(">HH", height, width) + jpeg[frame.end() + 4 :]


_ENCODINGS = [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": 0, "optimize": True}]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("settings", _ENCODINGS)
def test_jpeg_with_missing_data_is_rejected(mode: str, settings: dict[str, object]) -> None:
    payload = encoded(drawn_image(1, 48, 48).convert(mode), **settings)
    prepare(payload)
    for width, height in ((2400, 2400), (48, 80), (80, 48)):
        for options in ({}, {"max_side": 40}):
            with pytest.raises(ShardError, match="the image data end before the last row"):
                prepare(_with_size(payload, width, height), **options)
    if "progressive" not in settings:  # a progressive JPEG is complete after each scan
        with pytest.raises(ShardError, match="the image data end before the last row"):
            prepare(payload[: len(payload) * 4 // 5] + b"\xff\xd9")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("settings", _ENCODINGS)
def test_grey_corner_is_accepted(mode: str, settings: dict[str, object]) -> None:
    image = drawn_image(1, 70, 50).convert(mode)
    image.paste({"RGB": (128, 128, 128), "L": 128, "CMYK": (127, 127, 127, 127)}[mode], (0, 20, 70, 50))
    for size in ((70, 50), (7, 5)):
        prepare(encoded(image.resize(size), **settings) + b"bytes after the end")


def test_any_flipped_bit_of_a_png_is_detected() -> None:
    payload = encoded(drawn_image(1, 60, 50), "PNG")
    prepare(payload + b"bytes after the end")
    for at in range(0, len(payload), 97):
        broken = bytearray(payload)
        broken[at] ^= 4
        with pytest.raises(ShardError):
            prepare(bytes(broken))
    with pytest.raises(ShardError, match="the file ends before the image does"):
        prepare(payload[:-1])


def test_orientation_in_xmp_alone_is_stored_as_exif() -> None:
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    payload = encoded(drawn_image(1, 40, 30), xmp=xmp)
    prepared = prepare(payload)
    assert (prepared.width, prepared.height) == (30, 40) and len(prepared.payload) == len(payload) + 36
    with Image.open(io.BytesIO(prepared.payload)) as stored:
        assert stored.getexif()[0x0112] == 6 and stored.size == (40, 30)
    np.testing.assert_array_equal(decode(prepared.payload), decode(payload))
    assert not read_header(prepared.payload).needs_host
