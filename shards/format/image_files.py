"""Open image files of an explicit list of formats, recognised by content.

``PIL.Image.open`` tries every plug-in that is installed. Some of them run a program (EPS starts Ghostscript), others
read whole archives or decompress without a limit. So this module recognises the format and calls only the plug-in of
that format. All other code opens images through ``open_image``.
"""

from __future__ import annotations

import ctypes
import functools
import io
import logging
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from shards.errors import ShardError

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.2
    AvifImagePlugin = None  # type: ignore[assignment]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "TGA", "JPEG2000", "AVIF")
_SIGNATURES = (
    ("JPEG", b"\xff\xd8\xff"),
    ("PNG", b"\x89PNG\r\n\x1a\n"),
    ("TIFF", b"II*\0"),
    ("TIFF", b"MM\0*"),
    ("TIFF", b"II+\0"),
    ("TIFF", b"MM\0+"),
    ("GIF", b"GIF87a"),
    ("GIF", b"GIF89a"),
    ("BMP", b"BM"),
    ("JPEG2000", b"\xff\x4f\xff\x51"),
    ("JPEG2000", b"\0\0\0\x0cjP  \r\n\x87\n"),
)
_REFUSED_SIGNATURES = (
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"%PDF", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"SIMPLE  =", "FITS"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
    (b"<!DOCTYPE", "HTML"),
    (b"<html", "HTML"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_AVIF_BRANDS = (b"avif", b"avis")
_MAX_BRAND_BYTES = 1024
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_TGA_HEADER = struct.Struct("<BBBHHBHHHHBB")
_TGA_DEPTHS = {1: (8,), 2: (16, 24, 32), 3: (8, 16), 9: (8,), 10: (16, 24, 32), 11: (8, 16)}


_SAMPLES, _PLANES, _SAMPLE_FORMAT, _SIGNED = 277, 284, 339, 2  # tags of TIFF


class _UprightTiff(TiffImagePlugin.TiffImageFile):
    """A TIFF as it is stored: Pillow's own class rotates it while loading and re-writes its EXIF, which can fail."""

    def _open(self) -> None:
        super()._open()
        # some versions of Pillow exchange width and height here and rotate the pixels later
        self._size = self.tag_v2[TiffImagePlugin.IMAGEWIDTH], self.tag_v2[TiffImagePlugin.IMAGELENGTH]

    def _setup(self) -> None:
        if self.tag_v2.get(_SAMPLES, 1) == 1:
            # one plane is contiguous; Pillow's way of reading planes knows fewer kinds of pixels
            self.tag_v2[_PLANES] = 1
        if _SIGNED in self.tag_v2.get(_SAMPLE_FORMAT, ()):
            raise ShardError("signed pixels have no defined white; convert the image to unsigned ones")
        super()._setup()

    def load_prepare(self) -> None:
        ImageFile.ImageFile.load_prepare(self)

    def load_end(self) -> None:
        pass


_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": _UprightTiff,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "TGA": TgaImagePlugin.TgaImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
if AvifImagePlugin is not None:
    _OPENERS["AVIF"] = AvifImagePlugin.AvifImageFile


def find_format(payload: bytes) -> str:
    """Return which of ``FORMATS`` an image file has, from its first bytes alone.

    A multi-picture JPEG (MPO) is a JPEG: its first picture is used.

    Raises:
        ShardError: of another format; names it where it is known.
    """
    if not payload:
        raise ShardError("the file is empty")
    for name, signature in _SIGNATURES:
        if payload.startswith(signature):
            return name
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "WEBP"
    if payload[4:8] == b"ftyp":
        return _find_brand(payload)
    if payload[:1] == b"P" and payload[1:2] in b"123456" and payload[2:3].isspace():
        return "PPM"
    if _is_tga(payload):
        return "TGA"
    start = payload[:64].lstrip()
    kind = next((name for signature, name in _REFUSED_SIGNATURES if start.startswith(signature)), "an unknown format")
    raise ShardError(f"not an image: {kind}; the formats are {', '.join(FORMATS)}")


def open_image(payload: bytes) -> ImageFile.ImageFile:
    """Open an image file without decoding its pixels, as it is stored: no orientation is applied.

    Unlike ``PIL.Image.open``, it never runs a program, prints no warnings and has no limit of pixels of its own.

    Raises:
        ShardError: the format is not one of ``FORMATS``, or its header cannot be read; gives the reason.
    """
    return open_as(find_format(payload), payload)


def open_as(name: str, payload: bytes) -> ImageFile.ImageFile:
    """Open an image file of a known format; raises as ``open_image``."""
    opener = _OPENERS.get(name)
    if opener is None:
        raise ShardError("AVIF needs Pillow 11.3 or newer; update Pillow or convert the image")
    with one_line_errors():
        return opener(io.BytesIO(payload))


class one_line_errors:  # a context manager that is used like a function
    """Turn any exception of an image decoder into a ``ShardError`` with its reason on one line."""

    def __enter__(self) -> None:
        _silence()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or isinstance(error, ShardError) or not isinstance(error, Exception):
            return
        if isinstance(error, MemoryError):
            raise ShardError("not enough memory to decode it") from error
        raise ShardError(_reason(error)) from error


@functools.cache
def _silence() -> None:
    """Turn off the messages that Pillow and libtiff print about single images: errors are raised as well."""
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/libtiff" in line}
    except OSError:
        return  # another platform, where libtiff prints
    for path in paths:
        # other programs' libraries, such as DALI's, may have a similar name and no such function
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(path)
            library.TIFFSetErrorHandler(None)
            library.TIFFSetWarningHandler(None)


def _reason(error: Exception) -> str:
    """Return an error as one line, without Pillow's object addresses."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "its header cannot be read"
    if str(error) == "unknown pixel mode":  # of Pillow
        return "its pixels cannot be converted to 8-bit RGB"
    # decoders fail with these on fields that contradict each other; their text ("0") explains nothing
    if isinstance(error, (ArithmeticError, AttributeError, LookupError, TypeError, struct.error)):
        return f"it is damaged or unusual ({' '.join(f'{type(error).__name__}: {error}'.split())})"
    return " ".join(str(error).split()) or type(error).__name__


def _find_brand(payload: bytes) -> str:
    end = min(int.from_bytes(payload[:4], "big"), _MAX_BRAND_BYTES)
    brands = [payload[8:12], *(payload[at : at + 4] for at in range(16, end, 4))]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "AVIF"
    if any(brand in _HEIF_BRANDS for brand in brands):
        raise ShardError("HEIC is not supported; convert the image to JPEG")
    raise ShardError(f"not an image: a media file of type {brands[0]!r}")


def _is_tga(payload: bytes) -> bool:
    """Recognise a TGA, which has no signature: by the footer of version 2, else by a header without contradictions."""
    if payload.endswith(_TGA_FOOTER):
        return True
    if len(payload) < _TGA_HEADER.size:
        return False
    id_length, map_type, kind, map_first, map_length, map_depth, _, _, width, height, depth, flags = (
        _TGA_HEADER.unpack_from(payload)
    )
    if depth not in _TGA_DEPTHS.get(kind, ()) or not width or not height or flags & 0xC0:
        return False
    is_mapped = kind in (1, 9)
    if is_mapped != bool(map_type) or map_type > 1 or (not is_mapped and (map_first or map_length or map_depth)):
        return False
    if is_mapped and (map_depth not in (15, 16, 24, 32) or not map_length):
        return False
    palette = map_length * ((map_depth + 7) // 8)
    # a run of the compressed kinds covers at most 128 pixels
    pixels = width * height * depth // 8 if kind < 8 else width * height // 128
    return _TGA_HEADER.size + id_length + palette + pixels <= len(payload)
