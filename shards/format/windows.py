"""Windows of an image that need not fit into memory.

Of a TIFF, only the tiles or strips that a window touches are read and decoded, and the latest of them are kept for the
next window. All other images are decoded whole, within the limits of ``decode``. Files are untrusted: a tile or strip
is decoded only if its size, in the tags and in its own header, is within bounds.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shards.errors import SampleError, ShardError, SourceUnreachable
from shards.format import image_header, imagery
from shards.format.decode import decode, read_bounded, turn_upright
from shards.format.image_files import one_line_errors
from shards.format.image_header import SIDEWAYS
from shards.format.images import MAX_BYTES
from shards.format.pixels import PixelFormat
from shards.storage.object_file import ObjectFile

Array = npt.NDArray[Any]
Read = Callable[[int, int], bytes]  # returns the bytes [begin, end) of a file

_KEPT_BYTES = 128 << 20  # of decoded tiles and strips
_PIECE_BYTES = 1 << 20
_SPARE_BYTES = 1 << 16  # encoded parts may have twice their decoded size plus this
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_RGB, _YCBCR = 2, 6  # photometric interpretations
_JPEG = (6, 7)  # compressions


class Image(Protocol):
    """An open image; ``height`` and ``width`` are upright."""

    height: int
    width: int

    def read(self, top: int, left: int, bottom: int, right: int) -> Array:
        """Return the pixels of a window, upright, as ``decode`` would: [bottom - top, right - left, channels].

        Raises:
            ShardError: a part of the file that the window needs is damaged or too large; gives the reason.
        """


def open_image(num_bytes: int, read: Read, pixels: PixelFormat, max_pixels: int) -> Image:
    """Open an image file of ``num_bytes``; a TIFF that is read by windows may have more than ``max_pixels``.

    Raises:
        ShardError: not an image of this format, truncated or too large; gives the reason.
    """
    image = open_tiff(num_bytes, read, pixels)
    if image is not None:
        return image
    if num_bytes > MAX_BYTES:
        raise ShardError(f"the file has {num_bytes} bytes, more than {MAX_BYTES}")
    return _WholeImage(read(0, num_bytes), pixels, max_pixels)


def open_oversized(payload: bytes, pixels: PixelFormat, max_pixels: int) -> TiffImage | None:
    """Return an image that is too large to be decoded whole, but can be read by windows; None for all others.

    Raises:
        ShardError: it has no readable header, or a part of it is too large.
    """
    header = imagery.read_header(payload, pixels)
    try:
        imagery.check_size(header, pixels, max_pixels)
    except ShardError:
        return open_tiff(len(payload), lambda begin, end: payload[begin:end], pixels, max_pixels)
    return None


def open_tiff(num_bytes: int, read: Read, pixels: PixelFormat, max_part_pixels: int | None = None) -> TiffImage | None:
    """Open a TIFF; return None for other formats, and if its values need a conversion, so that it is decoded whole.

    Raises:
        ShardError: not an image of this format, truncated, or with parts of more than ``max_part_pixels``.
    """
    if read(0, 4) not in _TIFF_SIGNATURES:
        return None
    num_read = 0

    def read_tags(begin: int, end: int) -> bytes:
        nonlocal num_read
        num_read += end - begin
        if num_read > imagery.MAX_TAG_BYTES:
            raise ShardError(f"its tags have more than {imagery.MAX_TAG_BYTES} bytes")
        return read(begin, end)

    file = io.BufferedReader(ObjectFile(read_tags, num_bytes, _PIECE_BYTES))
    with ExitStack() as stack:
        try:
            page = stack.enter_context(imagery.open_tiff(file))
        except ShardError as error:
            if pixels.is_rgb and not isinstance(error, SampleError | SourceUnreachable):
                return None  # Pillow gives the pixels or the reason
            raise
        if pixels.is_rgb and not _is_plain_rgb(page):
            return None
        image = TiffImage(page, num_bytes, read, pixels)
        if max_part_pixels is not None and math.prod(image.part) > max_part_pixels:
            size = "x".join(map(str, image.part[::-1]))
            raise ShardError(f"its tiles or strips of {size} are more than {max_part_pixels} pixels")
        return image


def _is_plain_rgb(page: Any) -> bool:
    is_rgb = page.photometric == _RGB or (page.photometric == _YCBCR and page.compression in _JPEG)
    return is_rgb and page.samplesperpixel == 3 and page.bitspersample == 8 and str(page.dtype) == "uint8"


class _WholeImage:
    """An image that is decoded when its first window is read."""

    def __init__(self, payload: bytes, pixels: PixelFormat, max_pixels: int) -> None:
        header = read_bounded(payload, max_pixels, pixels)
        self.height, self.width = header.height, header.width
        self._payload, self._pixels, self._max_pixels = payload, pixels, max_pixels
        self._values: Array | None = None

    def read(self, top: int, left: int, bottom: int, right: int) -> Array:
        if self._values is None:
            self._values = decode(self._payload, pixels=self._pixels, max_pixels=self._max_pixels)
            self._payload = b""
        return self._values[top:bottom, left:right]


class TiffImage:
    """The first page of a TIFF, or the pages that are its channels; its file need not stay open.

    Attributes:
        height, width: in pixels, upright.
        part: height and width of a tile or strip, as stored.
        num_decoded: tiles and strips that have been decoded.

    Args:
        page: the first page, a ``tifffile.TiffPage`` of an open file.
        num_bytes: length of the file.
        read: reads the file.
        pixels: format that the image must have.
    """

    def __init__(self, page: Any, num_bytes: int, read: Read, pixels: PixelFormat) -> None:
        import tifffile

        self._pages = imagery.channel_pages(page, pixels)
        stored = PixelFormat(pixels.channels // len(self._pages), pixels.dtype)
        self._spans = np.concatenate([imagery.check_tiff(each, stored, num_bytes) for each in self._pages])
        self._page, self._read, self._pixels = page, read, pixels
        # otherwise a small file could repeat one part of itself in a huge image
        if self._spans[:, 1].sum() > num_bytes:
            raise ShardError("its tiles or strips overlap in the file")
        self._is_separate = pixels.channels > 1 and (page.planarconfig == imagery.SEPARATE or len(self._pages) > 1)
        self._height, self._width = page.imagelength, page.imagewidth
        self.part: tuple[int, int] = page.chunks[:2]
        self._grid = math.ceil(self._height / self.part[0]), math.ceil(self._width / self.part[1])
        self._part_bytes = imagery.part_bytes(page)
        self._has_codec_header = page.compression in tifffile.TIFF.IMAGE_COMPRESSIONS
        self._tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        self._turn = imagery.tiff_orientation(page)
        is_sideways = self._turn in SIDEWAYS
        self.height, self.width = (self._width, self._height) if is_sideways else (self._height, self._width)
        self._kept: OrderedDict[int, Array] = OrderedDict()
        self._kept_bytes = 0
        self.num_decoded = 0

    def read(self, top: int, left: int, bottom: int, right: int) -> Array:
        # undo turn_upright, in reverse
        if self._turn in (2, 3, 6, 7):
            left, right = self.width - right, self.width - left
        if self._turn in (3, 4, 7, 8):
            top, bottom = self.height - bottom, self.height - top
        if self._turn in SIDEWAYS:
            top, left, bottom, right = left, top, right, bottom
        return np.ascontiguousarray(turn_upright(self._read_stored(top, left, bottom, right), self._turn))

    def parts(self) -> Iterator[Array]:
        """Yield the pixels of each tile or strip [rows, columns, channels] as stored; each is decoded once.

        Raises:
            ShardError: as ``read``.
        """
        height, width = self.part
        for top in range(0, self._height, height):
            for left in range(0, self._width, width):
                yield self._read_stored(top, left, min(top + height, self._height), min(left + width, self._width))

    def _read_stored(self, top: int, left: int, bottom: int, right: int) -> Array:
        values = imagery.invert_white(self._join_parts(top, left, bottom, right), self._page)
        if self._pixels.dtype == "float32" and not np.isfinite(values).all():
            raise ShardError("it has NaN or infinite values; replace them before packing")
        return values

    def _join_parts(self, top: int, left: int, bottom: int, right: int) -> Array:
        out = np.empty((bottom - top, right - left, self._pixels.channels), self._pixels.dtype)
        height, width = self.part
        for plane in range(self._pixels.channels if self._is_separate else 1):
            channels = slice(plane, plane + 1) if self._is_separate else slice(None)
            for row in range(top // height, (bottom - 1) // height + 1):
                for column in range(left // width, (right - 1) // width + 1):
                    values = self._decode((plane * self._grid[0] + row) * self._grid[1] + column)
                    y, x = row * height, column * width
                    above, below = max(top, y), min(bottom, y + height)
                    begin, end = max(left, x), min(right, x + width)
                    piece = values[above - y : below - y, begin - x : end - x]
                    target = out[above - top : below - top, begin - left : end - left, channels]
                    if piece.shape != target.shape:
                        raise ShardError("a tile or strip is smaller than its tags say")
                    target[...] = piece
        return out

    def _decode(self, index: int) -> Array:
        """Return a tile or strip [rows, columns, channels]; at the edges of the image it may be smaller."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        offset, count = self._spans[index].tolist()
        number, part = divmod(index, len(self._spans) // len(self._pages))
        if count > 2 * self._part_bytes + _SPARE_BYTES:
            raise ShardError(f"a tile or strip has {count} bytes, more than its pixels need")
        payload = self._read(offset, offset + count)
        with one_line_errors():
            if self._has_codec_header:
                self._check_codec_header(payload)
            values = self._pages[number].decode(payload, part, **self._tables)[0][0]
        if values.dtype != self._pixels.dtype:
            raise ShardError(f"a tile or strip has {values.dtype}, not {self._pixels.dtype}")
        self.num_decoded += 1
        self._kept[index] = values
        self._kept_bytes += values.nbytes
        while len(self._kept) > 1 and self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return values

    def _check_codec_header(self, payload: bytes) -> None:
        """Raise a ShardError if a tile or strip that is an image file is larger than the tags say."""
        try:
            header = image_header.read_header((self._tables["jpegheader"] or b"") + payload)
        except ShardError as error:
            raise ShardError(f"a tile or strip of compression {self._page.compression}: {error}") from error
        if header.height > self.part[0] or header.width > self.part[1]:
            raise ShardError(f"a tile or strip has {header.width}x{header.height} pixels, more than its tags say")
