"""The header of an image file: size, orientation, and whether DALI decodes the file to exactly the same pixels.

The parsers of JPEG, PNG and WebP take microseconds, so that training can run them on every image. They are strict:
a file with any unknown part is decoded on the host (``decode.py``), whose pixels are the reference.
Other formats are always decoded on the host, and Pillow reads their headers.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import NoReturn

from PIL import Image, TiffImagePlugin

from shards.errors import ShardError
from shards.format.image_files import find_format, one_line_errors, open_as

MAX_SIDE = 65_535  # pixels; width and height are 16 bits in the index
MAX_SCANS = 256  # of a progressive JPEG; encoders write about ten
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

_MAX_PARTS = 1 << 18  # chunks or segments of a file
_MAX_METADATA_BYTES = 1 << 20  # of one text, after decompression
_ORIENTATION_TAG = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
_EXIF_PREFIX = b"Exif\0\0"
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
_PNG_XMP_PREFIX = b"XML:com.adobe.xmp\0"
_PNG_RAW_EXIF_PREFIX = b"Raw profile type exif\0"
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_SCAN_MARKER = b"\xff\xda"
# of a marker that ends a scan: neither a stuffed zero, nor a restart, nor a fill byte
_END_OF_SCAN = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")


@dataclass(frozen=True)
class Header:
    """Size, orientation and kind of an image file.

    Attributes:
        format: one of ``image_files.FORMATS``.
        width, height: in pixels, with the orientation applied.
        orientation: 1 to 8 as in EXIF, from EXIF or, where EXIF has none, from XMP.
        needs_host: False if DALI decodes the file, and to the pixels of ``decode``.
    """

    format: str
    width: int
    height: int
    orientation: int
    needs_host: bool


def read_header(payload: bytes) -> Header:
    """Read the header of an image file.

    Raises:
        ShardError: not an image, without a readable size, or with too many scans; gives the reason.
    """
    name = find_format(payload)
    parser = _PARSERS.get(name)
    if parser is not None:
        try:
            parts = parser(payload)
        except (_NotPlain, struct.error, IndexError):
            pass
        else:
            return _make_header(name, *parts)
    if name == "JPEG" and count_scans(payload) > MAX_SCANS:
        raise ShardError(f"a JPEG of more than {MAX_SCANS} scans")
    with one_line_errors():
        image = open_as(name, payload)
        return _make_header(name, *image.size, find_orientation(image), True)


def find_orientation(image: Image.Image) -> int:
    """Return the orientation of an image that Pillow has opened: 1 to 8, 1 if there is none."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # EXIF that cannot be read holds no orientation
        orientation = 1
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        orientation = image.tag_v2.get(_ORIENTATION_TAG, orientation)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _make_header(name: str, width: int, height: int, orientation: int, needs_host: bool) -> Header:
    if width < 1 or height < 1:
        raise ShardError(f"it has {width}x{height} pixels")
    return Header(name, *((height, width) if orientation in SIDEWAYS else (width, height)), orientation, needs_host)


class _NotPlain(Exception):
    """The file is left to the host decoder."""


def _leave_to_host() -> NoReturn:
    raise _NotPlain


_Parts = tuple[int, int, int, bool]  # width, height as stored, orientation, needs_host


class _Metadata:
    """The orientation of a file, collected from its EXIF and XMP parts."""

    def __init__(self) -> None:
        self.exif: int | None = None
        self.xmp: int | None = None
        self.has_exif = False
        # whether all decoders read the same orientation
        self.is_plain = True

    def add_exif(self, tiff: bytes, *, is_plain: bool = True) -> None:
        """Add the TIFF structure of an EXIF part."""
        if self.has_exif:
            self.is_plain = False
            return
        self.has_exif = True
        self.exif, is_understood = _exif_orientation(tiff)
        self.is_plain &= is_plain and is_understood

    def add_xmp(self, text: bytes) -> None:
        match = _XMP_ORIENTATION.search(text)
        if match is not None and self.xmp is None:
            self.xmp = int(match[1])

    def orientation(self) -> tuple[int, bool]:
        """Return the orientation, and whether DALI finds the same one."""
        if self.exif is not None:
            return self.exif, self.is_plain
        return (1, self.is_plain) if self.xmp is None else (self.xmp, self.is_plain and self.xmp == 1)


def _exif_orientation(tiff: bytes) -> tuple[int | None, bool]:
    """Return the orientation of the first directory, if any, and whether it was found where it belongs."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None, False
    found, is_plain = None, True
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, num = struct.unpack_from(order + "HHI", tiff, at)
            if tag != _ORIENTATION_TAG:
                continue
            layout = {1: "B", 3: "H", 4: "I"}.get(kind)
            is_plain = is_plain and found is None and kind == 3 and num == 1
            if layout is not None and num >= 1 and found is None:
                (value,) = struct.unpack_from(order + layout, tiff, at + 8)
                found = value if 1 <= value <= 8 else 1
                is_plain = is_plain and found == value
    except struct.error:  # the directory ends early
        is_plain = False
    return found, is_plain


def _read_jpeg(payload: bytes) -> _Parts:
    # a file without an end marker may be truncated
    needs_host = payload[-2:] != b"\xff\xd9"
    metadata = _Metadata()
    size: tuple[int, int] | None = None
    frame = channels = 0
    at, num_bytes, num_segments = 2, len(payload), 0
    while True:
        if payload[at] != 0xFF:
            _leave_to_host()
        marker = payload[at + 1]
        if marker in (0x00, 0x01, 0xFF, 0xD8, 0xD9) or 0xD0 <= marker <= 0xD7:
            _leave_to_host()
        length = payload[at + 2] << 8 | payload[at + 3]
        start, end = at + 4, at + 2 + length
        num_segments += 1
        if length < 2 or end > num_bytes or num_segments > _MAX_PARTS:
            _leave_to_host()
        if marker == 0xDA:
            # a sequential image with all its channels in the first scan has no others that are decoded
            has_scans = frame == 0xC2 or payload[start] != channels
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xCC):
            if size is not None or length < 8:
                _leave_to_host()
            depth, height, width, components = struct.unpack_from(">BHHB", payload, start)
            size, frame, channels = (width, height), marker, components
            if marker > 0xC2 or depth != 8 or components not in (1, 3) or length != 8 + 3 * components or not height:
                _leave_to_host()
            # components named R, G, B are not YCbCr
            needs_host |= components == 3 and payload[start + 6 : end : 3] == b"RGB"
        elif marker == 0xE1:
            if payload.startswith(_EXIF_PREFIX, start, end):
                metadata.add_exif(payload[start + len(_EXIF_PREFIX) : end])
            elif payload.startswith(_XMP_PREFIX, start, end):
                metadata.add_xmp(payload[start + len(_XMP_PREFIX) : end])
        elif marker == 0xEE and payload.startswith(b"Adobe", start, end):
            # colour transform 1 is YCbCr
            needs_host |= length < 14 or payload[start + 11] != 1
        at = end
    if size is None:
        _leave_to_host()
    if has_scans and payload.count(_SCAN_MARKER) > MAX_SCANS and count_scans(payload) > MAX_SCANS:
        raise ShardError(f"a JPEG of more than {MAX_SCANS} scans")
    orientation, is_plain = metadata.orientation()
    return *size, orientation, needs_host or not is_plain


def count_scans(payload: bytes) -> int:
    """Return the number of scans of a JPEG up to its end marker, in linear time; stops beyond ``MAX_SCANS``."""
    at, scans = 2, 0
    for _ in range(_MAX_PARTS):
        found = _END_OF_SCAN.search(payload, at)
        if found is None or scans > MAX_SCANS:
            return scans
        marker = payload[found.start() + 1]
        if marker == 0xD9:
            return scans
        length = int.from_bytes(payload[found.end() : found.end() + 2], "big")
        scans += marker == 0xDA
        at = found.end() + (0 if marker == 0xD8 else max(length, 2))
    return MAX_SCANS + 1  # too many segments to count


def _read_png(payload: bytes) -> _Parts:
    metadata = _Metadata()
    needs_host = False
    width, height, depth, color, compression, filters, interlace = struct.unpack_from(">IIBBBBB", payload, 16)
    if payload[8:16] != b"\0\0\0\x0dIHDR" or depth not in _PNG_DEPTHS.get(color, ()):
        _leave_to_host()
    if compression or filters or interlace > 1:
        _leave_to_host()
    needs_host = color in (4, 6)
    has_data = has_palette = False
    for kind, start, end in png_chunks(payload):
        if kind == b"IDAT":
            has_data = True
        elif kind == b"IEND":
            break
        elif kind == b"PLTE":
            has_palette = True
            # DALI's library clips indices beyond the palette
            needs_host |= has_data or (end - start) % 3 != 0
        elif kind in (b"tRNS", b"acTL", b"iCCP", b"fcTL", b"fdAT"):
            # the library behind DALI prints warnings about common colour profiles
            needs_host = True
        elif kind[0] & 0x20:
            if zlib.crc32(payload[start - 4 : end]) != int.from_bytes(payload[end : end + 4], "big"):
                needs_host = True
                continue
            if kind == b"eXIf":
                metadata.add_exif(payload[start:end], is_plain=not has_data)
            elif kind in (b"iTXt", b"tEXt", b"zTXt"):
                _add_png_text(metadata, kind, payload[start:end])
        elif kind != b"IHDR":
            needs_host = True  # an unknown critical chunk
    if not has_data or has_palette < (color == 3):
        _leave_to_host()
    orientation, is_plain = metadata.orientation()
    return width, height, orientation, needs_host or not is_plain


def png_chunks(payload: bytes) -> list[tuple[bytes, int, int]]:
    """Return the chunks of a PNG up to IEND: kind, and the span of the content.

    Raises:
        ShardError: the file ends before IEND, or has too many chunks.
    """
    chunks = []
    at, num_bytes = 8, len(payload)
    while True:
        start = at + 8
        end = start + int.from_bytes(payload[at : at + 4], "big")
        kind = payload[at + 4 : start]
        if end + 4 > num_bytes:
            raise ShardError("the file ends before the image does")
        chunks.append((kind, start, end))
        if kind == b"IEND":
            return chunks
        if len(chunks) > _MAX_PARTS:
            raise ShardError(f"a PNG of more than {_MAX_PARTS} chunks")
        at = end + 4


def _add_png_text(metadata: _Metadata, kind: bytes, content: bytes) -> None:
    if kind == b"iTXt" and content.startswith(_PNG_XMP_PREFIX):
        is_compressed = content[len(_PNG_XMP_PREFIX)]
        rest = content[len(_PNG_XMP_PREFIX) + 2 :].split(b"\0", 2)
        if len(rest) == 3:
            metadata.add_xmp(_inflate(rest[2]) if is_compressed else rest[2])
    elif kind != b"iTXt" and content.startswith(_PNG_RAW_EXIF_PREFIX):
        # written by ImageMagick: a name, a length, then EXIF as hexadecimal text
        text = content[len(_PNG_RAW_EXIF_PREFIX) :]
        lines = (_inflate(text[1:]) if kind == b"zTXt" else text).split(b"\n", 3)
        try:
            exif = bytes.fromhex(lines[-1].decode("ascii"))
        except ValueError:
            return
        metadata.add_exif(exif.removeprefix(_EXIF_PREFIX), is_plain=False)


def _inflate(content: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(content, _MAX_METADATA_BYTES)
    except zlib.error:
        return b""


def _read_webp(payload: bytes) -> _Parts:
    metadata = _Metadata()
    num_bytes = int.from_bytes(payload[4:8], "little") + 8
    kind, start = payload[12:16], 20
    if num_bytes > len(payload):
        _leave_to_host()
    # bytes after the image are passed over, but may also be a sign of damage
    needs_host = num_bytes != len(payload)
    if kind == b"VP8 ":
        width, height = _read_vp8(payload, start)
    elif kind == b"VP8L":
        width, height, has_alpha = _read_vp8l(payload, start)
        needs_host |= has_alpha
    elif kind == b"VP8X":
        flags = payload[start]
        width = int.from_bytes(payload[start + 4 : start + 7], "little") + 1
        height = int.from_bytes(payload[start + 7 : start + 10], "little") + 1
        needs_host |= bool(flags & 0x12)  # alpha, animation
        at, num_images, num_chunks = 12, 0, 0
        while at + 8 <= num_bytes:
            kind, start = payload[at : at + 4], at + 8
            end = start + int.from_bytes(payload[at + 4 : start], "little")
            num_chunks += 1
            if end > num_bytes or num_chunks > _MAX_PARTS:
                _leave_to_host()
            if kind == b"EXIF":
                exif = payload[start:end]
                metadata.add_exif(exif.removeprefix(_EXIF_PREFIX), is_plain=not exif.startswith(_EXIF_PREFIX))
            elif kind == b"XMP ":
                metadata.add_xmp(payload[start:end])
            elif kind in (b"VP8 ", b"VP8L"):
                num_images += 1
                inner = _read_vp8(payload, start) if kind == b"VP8 " else _read_vp8l(payload, start)
                needs_host |= inner[:2] != (width, height) or inner[2:] == (True,)
            elif kind == b"ALPH":
                needs_host = True
            at = end + (end - start) % 2
        needs_host |= num_images != 1
    else:
        _leave_to_host()
    orientation, is_plain = metadata.orientation()
    return width, height, orientation, needs_host or not is_plain


def _read_vp8(payload: bytes, start: int) -> tuple[int, int]:
    if payload[start] & 1 or payload[start + 3 : start + 6] != b"\x9d\x01\x2a":
        _leave_to_host()
    width, height = struct.unpack_from("<HH", payload, start + 6)
    return width & 0x3FFF, height & 0x3FFF


def _read_vp8l(payload: bytes, start: int) -> tuple[int, int, bool]:
    (bits,) = struct.unpack_from("<I", payload, start + 1)
    if payload[start] != 0x2F:
        _leave_to_host()
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)


_PARSERS = {"JPEG": _read_jpeg, "PNG": _read_png, "WEBP": _read_webp}
