"""The stored form of an image: its own bytes, or a re-encoded image of a common format."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.errors import ShardError
from shards.format import imagery
from shards.format.decode import (
    DEFAULT_MAX_PIXELS,
    WHITE,
    Color,
    Decoded,
    composite,
    decode,
    load_jpeg,
    load_pixels,
    read_bounded,
    turn_upright,
)
from shards.format.image_files import one_line_errors
from shards.format.image_header import MAX_SIDE, Header, read_header
from shards.format.pixels import RGB, PixelFormat

__all__ = ["DEFAULT_MAX_PIXELS", "MAX_SIDE", "prepare", "read_size", "tolerant_pillow"]

MAX_BYTES = 1 << 30  # of an encoded image
DEFAULT_QUALITY = 95

# Formats that are stored unchanged, with their extension in a shard. Others are transcoded to PNG without loss, so that
# any reader of WebDatasets can use the shards.
_KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}
_KEPT_TIFF_MODES = ("L", "RGB")


@dataclass(frozen=True)
class PreparedImage:
    """An image that has been decoded in full, ready to be stored in a shard."""

    payload: bytes
    extension: str
    width: int
    height: int


@contextmanager
def tolerant_pillow() -> Iterator[None]:
    """Disable the pixel limit that Pillow applies to frames inside a file, so that only ``max_pixels`` applies.

    The limit is global to the process: use only while a single thread decodes.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def read_size(payload: bytes, pixels: PixelFormat = RGB) -> tuple[int, int]:
    """Return (width, height) in pixels from the header, with the orientation applied; takes microseconds for RGB.

    Raises:
        ShardError: the header cannot be read; gives the reason.
    """
    header = imagery.read_header(payload, pixels)
    return header.width, header.height


def prepare(
    payload: bytes,
    *,
    max_side: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    quality: int = DEFAULT_QUALITY,
    upright: bool = False,
    pixels: PixelFormat = RGB,
) -> PreparedImage:
    """Decode an image in full, as training does, and return what to store.

    Other formats than 8-bit RGB are never re-encoded: files of other kinds than those kept are stored as ``.npy``.

    Args:
        max_side: images with a longer side are shrunk to this many pixels and stored as JPEG, on white.
        max_pixels: images with more pixels are rejected before decoding.
        quality: JPEG quality for images re-encoded by ``max_side`` or ``upright``.
        upright: apply an EXIF rotation to the pixels instead of leaving it to the decoder.
        pixels: as ``decode``.

    Raises:
        ShardError: not an image, truncated, damaged, too large or of another pixel format; gives the reason.
    """
    header = read_bounded(payload, max_pixels, pixels)
    if not pixels.is_rgb:
        return _keep_values(payload, header, max_pixels, pixels)
    is_large = max_side is not None and max(header.width, header.height) > max_side
    with one_line_errors():
        if is_large or (upright and header.orientation != 1):
            return _to_jpeg(payload, header, max_side, quality)
        decoded = load_pixels(payload, max_pixels)
        extension = _KEPT_FORMATS.get(header.format)
        if extension is None or (extension == "tif" and decoded.mode not in _KEPT_TIFF_MODES):
            return _encode(_as_image(decoded, None), "PNG", "png")
    if max(header.width, header.height) > MAX_SIDE:
        raise ShardError(
            f"{header.width}x{header.height} is longer than {MAX_SIDE} pixels on a side; pack with --max-side"
        )
    return PreparedImage(_with_plain_orientation(payload, header), extension, header.width, header.height)


def _keep_values(payload: bytes, header: Header, max_pixels: int, pixels: PixelFormat) -> PreparedImage:
    values = decode(payload, max_pixels=max_pixels, pixels=pixels)
    if max(header.width, header.height) > MAX_SIDE:
        raise ShardError(f"{header.width}x{header.height} is longer than {MAX_SIDE} pixels on a side; cut it in parts")
    extension = _KEPT_FORMATS.get(header.format)
    if extension is None:
        payload, extension = _npy(values), "npy"
    return PreparedImage(payload, extension, header.width, header.height)


def encode_exact(values: npt.NDArray[Any]) -> PreparedImage:
    """Encode [height, width, channels]: integers of 1, 3 or 4 channels as PNG, all others as ``.npy``."""
    height, width, channels = values.shape
    if values.dtype == np.float32 or channels not in (1, 3, 4):
        return PreparedImage(_npy(values), "npy", width, height)
    import imagecodecs

    payload = imagecodecs.png_encode(values[..., 0] if channels == 1 else values)
    return PreparedImage(bytes(payload), "png", width, height)


def _npy(values: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _with_plain_orientation(payload: bytes, header: Header) -> bytes:
    """Add EXIF to a JPEG whose orientation is in XMP alone, which many decoders ignore."""
    if header.format != "JPEG" or not header.needs_host or header.orientation == 1:
        return payload
    # one directory with one entry: the tag, its type (16 bits), one value and padding
    segment = b"Exif\0\0MM" + struct.pack(">HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, header.orientation, 0, 0)
    changed = payload[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + payload[2:]
    read = read_header(changed)
    is_same = (read.width, read.height, read.orientation) == (header.width, header.height, header.orientation)
    return changed if is_same and not read.needs_host else payload


def _to_jpeg(payload: bytes, header: Header, max_side: int | None, quality: int) -> PreparedImage:
    if header.format == "JPEG":
        image = _as_image(load_jpeg(payload, header, max_side), WHITE)
    else:
        image = _as_image(load_pixels(payload, header.width * header.height), WHITE)
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return _encode(image, "JPEG", "jpg", quality=quality)


def _as_image(decoded: Decoded, background: Color | None) -> Image.Image:
    """Return decoded pixels upright in 8 bits, grey or RGB; without a background, with the alpha channel if any."""
    bands = []
    for top, bottom in decoded.bands():
        band = decoded.read_band(top, bottom)
        if band.shape[-1] in (2, 4) and background is not None:
            band = composite(band, background)
        bands.append(band)
    pixels = turn_upright(np.concatenate(bands), decoded.header.orientation)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _encode(image: Image.Image, kind: str, extension: str, **options: int) -> PreparedImage:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    if max(image.size) > MAX_SIDE:
        raise ShardError(f"{image.width}x{image.height} is longer than {MAX_SIDE} pixels on a side; use --max-side")
    return PreparedImage(buffer.getvalue(), extension, *image.size)
