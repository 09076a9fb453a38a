"""Values of images of any channels and depth, and files that are refused."""

from __future__ import annotations

import io
import re
import struct
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from image_files import drawn_pixels, saved
from PIL import Image

pytest.importorskip("tifffile")
import tifffile
from channel_images import ramp, tiff
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.format.decode import decode
from shards.format.imagery import require_extra
from shards.format.images import prepare, read_size
from shards.format.pixels import RGB, PixelFormat, to_rgb8

FOUR = PixelFormat(4, "uint16")


def array_bytes(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **options)
    return buffer.getvalue()


def tiff_bytes(values: np.ndarray, folder: Path, **options: object) -> bytes:
    tiff(values, folder / "x.tif", **options)
    return (folder / "x.tif").read_bytes()


def test_orientation_and_inverted_grey(tmp_path: Path) -> None:
    values, grey = ramp(FOUR), PixelFormat(1, "uint8")
    turned = tiff_bytes(values, tmp_path, extratags=[(274, "H", 1, 6, True)])
    assert read_size(turned, FOUR) == (40, 32)
    assert np.array_equal(decode(turned, pixels=FOUR), np.rot90(values, -1))
    tifffile.imwrite(tmp_path / "i.tif", ramp(grey)[..., 0], photometric="miniswhite")
    assert np.array_equal(decode((tmp_path / "i.tif").read_bytes(), pixels=grey), 255 - ramp(grey))


def test_formats_of_pillow_keep_their_channels() -> None:
    grey, alpha = PixelFormat(1, "uint8"), PixelFormat(4, "uint8")
    for kind in ("PNG", "BMP", "TIFF"):
        payload = saved(Image.fromarray(drawn_pixels(1)), kind)
        assert np.array_equal(decode(payload, pixels=grey)[..., 0], drawn_pixels(1)), kind
    transparent = saved(Image.fromarray(drawn_pixels(4)), "PNG")
    assert np.array_equal(decode(transparent, pixels=alpha), drawn_pixels(4))
    stored = prepare(saved(Image.fromarray(drawn_pixels(1)), "BMP"), pixels=grey)
    assert stored.extension == "npy" and np.array_equal(np.load(io.BytesIO(stored.payload))[..., 0], drawn_pixels(1))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (array_bytes(ramp(PixelFormat(3, "uint16"))), "shape [40, 32, 3] is not an image of 4 channels"),
        (array_bytes(ramp(FOUR).astype(np.int64)), "an array of int64 is not supported"),
        (array_bytes(ramp(FOUR).astype(np.uint8)), "it has 4 channels of uint8, not 4 channels of uint16"),
        (array_bytes(ramp(FOUR))[:-2], "its header promises 10240 bytes of values, the file has 10238"),
        (array_bytes(np.array([{}]), allow_pickle=True), "an array of object is not supported"),
        (array_bytes(ramp(FOUR)).replace(b"(40, 32, 4)", b"(9999999999, 4, 4)"), "its header"),
        (saved(Image.fromarray(drawn_pixels(3)), "PNG"), "it has 3 channels of uint8, not 4 channels of uint16"),
        (b"text", "not an image"),
    ],
)  # fmt: skip
def test_arrays_and_images_of_another_kind_are_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(ShardError, match=re.escape(reason)):
        decode(payload, pixels=FOUR)


def test_tiffs_of_another_kind_are_refused(tmp_path: Path) -> None:
    values = ramp(FOUR)
    whole = tiff_bytes(values, tmp_path, compression="zlib")
    faults = {
        "it is truncated, or tiles are missing": tiff_bytes(values, tmp_path)[:-10],
        "it has 13 channels of uint16": tiff_bytes(ramp(PixelFormat(13, "uint16")), tmp_path),
        "samples of float64 is not supported": tiff_bytes(values.astype(np.float64), tmp_path),
        "are 20480000000 bytes, too many to decode": _with_tag(_with_tag(whole, 256, 160_000), 257, 16_000),
    }
    for reason, payload in faults.items():
        with pytest.raises(ShardError, match=reason):
            decode(payload, pixels=FOUR, max_pixels=1 << 40)
    wide = _with_tag(tiff_bytes(values, tmp_path, tile=(16, 16), compression="zlib"), 322, 1 << 30)
    with pytest.raises(ShardError, match=r"too large|truncated"):
        decode(wide, pixels=FOUR)
    with pytest.raises(ShardError, match="more than 1000 pixels"):
        decode(whole, pixels=FOUR, max_pixels=1000)


def test_tiffs_whose_tags_contradict_each_other_are_refused_in_words(tmp_path: Path) -> None:
    tiled = tiff_bytes(ramp(FOUR), tmp_path, tile=(16, 16), compression="zlib")
    faults = {
        "it is damaged or unusual": tiled[:8],
        "its planar configuration is 9": _with_tag(tiled, 284, 9),
        "it is truncated, or tiles are missing": _with_tag(tiled, 324, 1 << 31),
    }
    for reason, payload in faults.items():
        with pytest.raises(ShardError, match=reason):
            decode(payload, pixels=FOUR)


def test_values_that_are_not_finite_are_refused() -> None:
    pixels, values = PixelFormat(1, "float32"), ramp(PixelFormat(1, "float32"))
    values[3, 4] = np.nan
    with pytest.raises(ShardError, match="NaN or infinite"):
        decode(array_bytes(values), pixels=pixels)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_give_an_image_or_one_line(data: st.DataObject) -> None:
    whole = bytearray(_damaged_source(data.draw(st.sampled_from(["npy", "tif"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, min(len(whole), 400) - 1))] = data.draw(st.integers(0, 255))
    payload = bytes(whole[: data.draw(st.integers(1, len(whole)))])
    try:
        found = decode(payload, pixels=FOUR, max_pixels=1 << 16)
        assert found.dtype == np.uint16 and found.shape[2] == 4
    except ShardError as error:
        assert "\n" not in str(error)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ShardError, match=re.escape("pip install 'streamtrain[imagery]'")):
        require_extra()
    with mock.patch.dict(sys.modules, {"tifffile": None}), pytest.raises(ShardError, match="imagery"):
        decode(_damaged_source("tif"), pixels=FOUR)


def test_values_are_shown_by_their_range() -> None:
    values = np.array([[0, 100, 50, 7], [200, 300, 75, 7]], np.uint16)
    assert to_rgb8(values, [(0, 200), (100, 300), (50, 100), (0, 1)]).tolist() == [[0, 0, 0], [255, 255, 128]]
    assert to_rgb8(values, [(0, 400)], [1]).tolist() == [[64] * 3, [191] * 3]
    picture = drawn_pixels(3)
    assert to_rgb8(picture, [(0.0, 255.0)]) is picture and RGB.is_rgb


def _damaged_source(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, ramp(FOUR))
    else:
        tifffile.imwrite(buffer, ramp(FOUR), photometric="minisblack", planarconfig="contig", compression="zlib")
    return buffer.getvalue()


def _with_tag(payload: bytes, tag: int, value: int) -> bytes:
    """Return a little-endian TIFF with another 32-bit value in a tag of its first directory."""
    changed = bytearray(payload)
    (start,) = struct.unpack_from("<I", payload, 4)
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", payload, start)[0], 12):
        if struct.unpack_from("<H", payload, at)[0] == tag:
            struct.pack_into("<HHII", changed, at, tag, 4, 1, value)
    return bytes(changed)
