"""Image validation with Pillow: size, full decode, and conversion of formats that DALI cannot decode."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, ImageOps

from shards.errors import ShardError

DEFAULT_MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_BYTES = 1 << 30  # of an encoded image
MAX_SIDE = 65_535  # pixels; width and height are 16 bits in the index
DEFAULT_QUALITY = 95

# Formats that Pillow and DALI decode to the same pixels, by Pillow's name, with their extension in a shard. All others
# are transcoded: GIF and the rarer TIFF modes fail in DALI's decoder.
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}
_KEPT_TIFF_MODES = ("L", "RGB")
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

# Detection of damage that Pillow ignores: PNG chunks with wrong checksums, and JPEG data that end early. When the data
# end before the last row, a JPEG decoder fills the rest with grey and only issues a warning, which Pillow drops. So if
# the last decoded pixel has exactly this grey, noise is appended to every scan and the image is decoded again: if the
# pixels change, the data were incomplete.
_GREY = range(127, 130)  # value of a block without coefficients, after any colour conversion
_SEGMENT = re.compile(rb"\xff+([^\x00\xff])")
_END_OF_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # arithmetic coders may omit the end of their data
_SCAN, _END = 0xDA, 0xD9
_NOISE = bytes(37 * number % 251 for number in range(2048))  # without 0xFF, which would begin a marker
_NOISE_PIECES = 4
_PNG_HEADER_BYTES = 8


@dataclass(frozen=True)
class PreparedImage:
    """An image that has been decoded in full, ready to be stored in a shard."""

    payload: bytes
    extension: str
    width: int
    height: int


def read_size(payload: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the header, with the EXIF orientation applied.

    Raises:
        ShardError: the header cannot be read; gives the reason.
    """
    try:
        with Image.open(io.BytesIO(payload)) as image:
            return _displayed_size(image)
    except Exception as error:  # Pillow's plug-ins raise many kinds of errors on broken headers
        raise ShardError(_reason(error)) from error


def prepare(
    payload: bytes,
    *,
    max_side: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    quality: int = DEFAULT_QUALITY,
    upright: bool = False,
) -> PreparedImage:
    """Decode an image in full and return what to store: the same bytes where DALI can decode them.

    Args:
        max_side: images with a longer side are shrunk to this many pixels and stored as JPEG.
        max_pixels: images with more pixels are rejected before decoding.
        quality: JPEG quality for images re-encoded by ``max_side`` or ``upright``.
        upright: apply an EXIF rotation to the pixels instead of leaving it to the decoder.

    Raises:
        ShardError: not an image, truncated, damaged or too large; gives the reason.
    """
    if not payload:
        raise ShardError("the file is empty")
    try:
        with Image.open(io.BytesIO(payload)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ShardError(f"{width}x{height} is more than {max_pixels} pixels")
            width, height = _displayed_size(image)
            is_rotated = upright and image.getexif().get(_ORIENTATION_TAG, 1) not in (0, 1)
            if is_rotated or (max_side is not None and max(width, height) > max_side):
                return _to_jpeg(payload, image, max_side, quality)
            image.load()
            _check_integrity(payload, image)
            extension = _KEPT_FORMATS.get(image.format or "")
            if extension is None or (extension == "tif" and image.mode not in _KEPT_TIFF_MODES):
                return _encode(_to_8_bit(image), "PNG", "png")
    except ShardError:
        raise
    except Exception as error:  # truncation is an OSError, a broken PNG chunk a SyntaxError
        raise ShardError(_reason(error)) from error
    if max(width, height) > MAX_SIDE:
        raise ShardError(f"{width}x{height} is longer than {MAX_SIDE} pixels on a side; pack with --max-side")
    return PreparedImage(payload, extension, width, height)


@contextmanager
def tolerant_pillow() -> Iterator[None]:
    """Disable Pillow's warnings and its own pixel limit, so that only ``max_pixels`` applies.

    Both settings are global to the process: use only while a single thread decodes.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _displayed_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":
        image.load()  # applies the orientation; the size before loading depends on Pillow's version
        return image.size
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION_TAG) in _SIDEWAYS else (width, height)


def _to_jpeg(payload: bytes, image: Image.Image, max_side: int | None, quality: int) -> PreparedImage:
    if max_side is not None:
        image.draft(None, (2 * max_side, 2 * max_side))  # the JPEG decoder shrinks by a power of two while decoding
    image.load()
    _check_integrity(payload, image)
    converted = _to_8_bit(image)
    if max_side is not None:
        converted.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return _encode(converted, "JPEG", "jpg", quality=quality)


def _encode(image: Image.Image, kind: str, extension: str, **options: int) -> PreparedImage:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return PreparedImage(buffer.getvalue(), extension, *image.size)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Return the first frame, upright, as 8-bit greyscale or RGB."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")  # `convert` alone clips to white
    if image.mode in ("I", "F"):
        raise ShardError(f"pixels of mode {image.mode} have no defined white; convert the image to 8 or 16 bits first")
    upright = ImageOps.exif_transpose(image)
    return upright if upright.mode in ("L", "RGB") else upright.convert("RGB")


def _reason(error: Exception) -> str:
    """Return an error as one line, without Pillow's object addresses."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


def _check_integrity(payload: bytes, image: Image.Image) -> None:
    """Raise a ShardError for damage that decoding does not report; ``image`` is decoded at any scale, not rotated."""
    if image.format in ("JPEG", "MPO"):
        _check_jpeg(payload, image)
    elif image.format == "PNG":
        _check_png(payload)


def _check_jpeg(payload: bytes, image: Image.Image) -> None:
    corner = image.getpixel((image.width - 1, image.height - 1))
    if not all(value in _GREY for value in (corner if isinstance(corner, tuple) else (corner,))):
        return
    longer = _with_noise(payload)
    if longer is not None and _coarse(payload) != _coarse(longer):
        raise ShardError("the image data end before the last row")


def _check_png(payload: bytes) -> None:
    """Verify the checksums of all critical chunks, up to IEND."""
    offset = _PNG_HEADER_BYTES
    kind = b""
    while kind != b"IEND":
        length = int.from_bytes(payload[offset : offset + 4], "big")
        end = offset + 8 + length
        kind = payload[offset + 4 : offset + 8]
        if end + 4 > len(payload):
            raise ShardError("the file ends before the image does")
        if kind[:1].isupper() and zlib.crc32(payload[offset + 4 : end]) != struct.unpack_from(">I", payload, end)[0]:
            raise ShardError(f"the checksum of its {kind.decode('ascii', 'replace')} chunk differs")
        offset = end + 4


def _coarse(payload: bytes) -> bytes:
    """Return the pixels of a JPEG at 1/8 scale, which depend only on the first coefficient of each block."""
    with Image.open(io.BytesIO(payload)) as image:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        return image.tobytes()


def _with_noise(payload: bytes) -> bytes | None:
    """Return the JPEG with noise at the end of each scan, skipped in a complete image; None if not supported."""
    pieces, offset = [payload[:2]], 2
    while (segment := _SEGMENT.match(payload, offset)) is not None:
        marker = segment[1][0]
        if marker == _END:
            return b"".join([*pieces, payload[offset:]])
        length = int.from_bytes(payload[segment.end() : segment.end() + 2], "big")
        data = segment.end() + length
        if marker & 0xF0 == 0xC0 and marker not in (0xC4, 0xC8, 0xCC, *_HUFFMAN_FRAMES):
            return None
        pieces.append(payload[offset:data])
        offset = data
        if marker == _SCAN:
            end = _END_OF_SCAN.search(payload, data)
            if end is None:
                return None
            offset = end.start()
            restarts = _RESTART.findall(payload, data, offset)
            following = restarts[-1][1] - 0xD0 + 1 if restarts else 0
            # in a scan with restart markers, the decoder searches for the next marker before it continues
            noise = (_NOISE + bytes([0xFF, 0xD0 + (following + number) % 8]) for number in range(_NOISE_PIECES))
            pieces += [payload[data:offset], *noise]
    return None
