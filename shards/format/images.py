"""What Pillow says about an image's bytes: its size from the header, and whether it decodes in full."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps

from shards.errors import ShardError
from shards.format.silent_damage import check_whole

DEFAULT_MAX_PIXELS = 178_956_970  # Pillow's own bound against decompression bombs
MAX_BYTES = 1 << 30  # of an encoded image
MAX_SIDE = 65_535  # what the index's 16-bit width and height hold
DEFAULT_QUALITY = 95

# Formats that both Pillow and DALI decode to the same picture, by Pillow's name, with the extension that they get in a
# shard. Everything else is transcoded: GIF and the rarer TIFFs stop DALI's decoder.
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}
_KEPT_TIFF_MODES = ("L", "RGB")
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class Prepared:
    """An image that is known to decode, as it goes into a shard."""

    payload: bytes
    extension: str
    width: int
    height: int


def read_size(payload: bytes) -> tuple[int, int]:
    """(width, height) in pixels as displayed (with the EXIF orientation applied), from the header.

    Raises:
        ShardError: no known image format, with the reason.
    """
    try:
        with Image.open(io.BytesIO(payload)) as image:
            return _displayed_size(image)
    except Exception as error:  # Pillow's plug-ins raise nearly everything on broken headers
        raise ShardError(_reason(error)) from error


def prepare(
    payload: bytes,
    *,
    max_side: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    quality: int = DEFAULT_QUALITY,
    upright: bool = False,
) -> Prepared:
    """Decode an image in full and say what to store: the same bytes wherever DALI can decode them.

    Args:
        max_side: images with a longer side are shrunk to it and stored as JPEG.
        max_pixels: images with more pixels are refused before they are decoded.
        quality: of the JPEGs made by ``max_side`` and ``upright``.
        upright: turn images that carry an EXIF rotation, rather than leave that to the decoder.

    Raises:
        ShardError: not an image, truncated, broken or too large, with the reason.
    """
    if not payload:
        raise ShardError("the file is empty")
    try:
        with Image.open(io.BytesIO(payload)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ShardError(f"{width}x{height} is more than {max_pixels} pixels")
            width, height = _displayed_size(image)
            turned = upright and image.getexif().get(_ORIENTATION_TAG, 1) not in (0, 1)
            if turned or (max_side is not None and max(width, height) > max_side):
                return _encode_jpeg(payload, image, max_side, quality)
            image.load()
            check_whole(payload, image)
            extension = _KEPT_FORMATS.get(image.format or "")
            if extension is None or (extension == "tif" and image.mode not in _KEPT_TIFF_MODES):
                return _encode_png(image)
    except ShardError:
        raise
    except Exception as error:  # as above: truncation is an OSError, broken chunks a SyntaxError
        raise ShardError(_reason(error)) from error
    if max(width, height) > MAX_SIDE:
        raise ShardError(f"{width}x{height} is longer than {MAX_SIDE} pixels on a side; pack with --max-side")
    return Prepared(payload, extension, width, height)


def check_decodes(payload: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
    """Decode an image in full.

    Raises:
        ShardError: it does not decode to its last row, with the reason.
    """
    prepare(payload, max_pixels=max_pixels)


@contextmanager
def tolerant_pillow() -> Iterator[None]:
    """Within this, Pillow has no pixel bound of its own (``max_pixels`` alone decides) and prints no warnings.

    For processes or moments with one thread only: both settings are the process's.
    """
    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def _displayed_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":
        image.load()  # turns the image itself; what a TIFF says before depends on Pillow's version
        return image.size
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS else (width, height)


def _encode_jpeg(payload: bytes, image: Image.Image, max_side: int | None, quality: int) -> Prepared:
    if max_side is not None:
        image.draft(None, (2 * max_side, 2 * max_side))  # lets the JPEG decoder do the coarse part of the shrinking
    image.load()
    check_whole(payload, image)
    plain = _plain(image)
    if max_side is not None:
        plain.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    plain.save(buffer, "JPEG", quality=quality)
    return Prepared(buffer.getvalue(), "jpg", *plain.size)


def _encode_png(image: Image.Image) -> Prepared:
    plain = _plain(image)
    buffer = io.BytesIO()
    plain.save(buffer, "PNG")
    return Prepared(buffer.getvalue(), "png", *plain.size)


def _plain(image: Image.Image) -> Image.Image:
    """The first frame, upright, as 8-bit grey or RGB."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")  # `convert` alone clips to white
    if image.mode in ("I", "F"):
        raise ShardError(f"pixels of mode {image.mode} have no defined white; convert the image to 8 or 16 bits first")
    upright = ImageOps.exif_transpose(image)
    return upright if upright.mode in ("L", "RGB") else upright.convert("RGB")


def _reason(error: Exception) -> str:
    """An error as one short line, without Pillow's object addresses."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__
