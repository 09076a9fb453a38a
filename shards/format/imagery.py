"""Stored values of images of any channels and depth: TIFF by tifffile, and NumPy's ``.npy``.

Values are never scaled. The first page of a TIFF has all channels, or there is one page of one sample per channel.
White-is-zero integers are inverted; the caller applies the orientation. An array is [height, width], [height, width,
channels] or, if only the first axis has the set's number of channels, [channels, height, width]. Sizes in headers are
checked before memory is allocated.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.format import dicom, image_header
from shards.format.image_files import find_format, one_line_errors
from shards.format.image_header import SIDEWAYS, Header
from shards.format.pixels import DTYPES, MAX_CHANNELS, PixelFormat

Array = npt.NDArray[Any]

NPY = "NPY"
MAX_DECODED_BYTES = 1 << 30  # of one image, and of one tile or strip of it
EXTRA = "tiles, windows and images other than 8-bit RGB need the extra imagery: pip install 'streamtrain[imagery]'"
_NPY_SIGNATURE = b"\x93NUMPY"
_MAX_NPY_HEADER = 1024
_WHITE_IS_ZERO, _PALETTE = 0, 3
MAX_TAG_BYTES = 64 << 20  # enough for four million tiles or strips
CONTIGUOUS, SEPARATE = 1, 2  # planar configurations of a TIFF
_ORIENTATION_TAG = 274


def require_extra() -> None:
    """Raise a ShardError if a library that decodes these images is not installed."""
    if not all(map(importlib.util.find_spec, ("tifffile", "imagecodecs"))):
        raise ShardError(EXTRA)


def read_header(payload: bytes, pixels: PixelFormat) -> Header:
    """Read the header of an image of a set with ``pixels``, which may be too large to decode.

    Raises:
        ShardError: not an image, or without a readable size; gives the reason.
    """
    if pixels.is_rgb:
        return image_header.read_header(payload)
    if payload.startswith(_NPY_SIGNATURE):
        height, width, _ = array_layout(read_npy_header(payload)[0], pixels.channels)
        header = Header(NPY, width, height, 1, True)
    elif dicom.is_dicom(payload):
        header = dicom.read_header(payload)
    elif find_format(payload) == "TIFF":
        with open_tiff(io.BytesIO(payload)) as page:
            _require_supported(page)
            turn = tiff_orientation(page)
            width, height = page.imagewidth, page.imagelength
            header = Header("TIFF", *((height, width) if turn in SIDEWAYS else (width, height)), turn, True)
    else:
        header = image_header.read_header(payload)
    if min(header.width, header.height) < 1:
        raise ShardError(f"it has {header.width}x{header.height} pixels")
    return header


def check_size(header: Header, pixels: PixelFormat, max_pixels: int) -> None:
    """Raise a ShardError if an image has more than ``max_pixels``, or more bytes than may be decoded at once."""
    size = f"{header.width}x{header.height}"
    if (count := header.width * header.height) > max_pixels:
        raise ShardError(f"{size} is more than {max_pixels} pixels")
    if not pixels.is_rgb and (needed := count * pixels.num_bytes) > MAX_DECODED_BYTES:
        raise ShardError(f"{size} pixels of {pixels} are {needed} bytes, too many to decode")


def load_npy(payload: bytes, pixels: PixelFormat) -> Array:
    """Return the array of a ``.npy`` file as [height, width, channels] in native byte order; raises as ``decode``."""
    shape, is_fortran, dtype, start = read_npy_header(payload)
    height, width, is_first = array_layout(shape, pixels.channels)
    values: Array = np.frombuffer(payload, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
    values = np.moveaxis(values, 0, 2) if is_first else values.reshape(height, width, -1)
    return values.astype(dtype.newbyteorder("="), copy=False)


def load_tiff(payload: bytes, pixels: PixelFormat) -> Array:
    """Return a TIFF as [height, width, channels], without its orientation; raises as ``decode``."""
    with open_tiff(io.BytesIO(payload)) as page:
        pages = channel_pages(page, pixels)
        stored = PixelFormat(pixels.channels // len(pages), pixels.dtype)
        for each in pages:
            check_tiff(each, stored, len(payload))
        if len(pages) > 1:
            values = np.stack([each.asarray(maxworkers=1).reshape(page.imagelength, -1) for each in pages], axis=-1)
            return invert_white(values, page)
        shape, samples = (page.imagelength, page.imagewidth), pixels.channels
        values = page.asarray(maxworkers=1)
        is_separate = page.planarconfig == SEPARATE
        values = np.moveaxis(values.reshape(samples, *shape), 0, 2) if is_separate else values.reshape(*shape, samples)
        return invert_white(values, page)


def channel_pages(page: Any, pixels: PixelFormat) -> list[Any]:
    """Return the pages that hold the channels of a TIFF: the first, or one per channel.

    Raises:
        ShardError: there are several pages of one sample, but not one per channel, or they differ in size, type or
            compression, or have too many bytes of tags.
    """
    _require_supported(page)
    count = pixels.channels
    if page.samplesperpixel != 1 or count == 1:
        return [page]
    pages, tag_bytes = [page], 0
    # pages are counted up to one too many, because there may be millions
    for number in range(1, count + 1):
        try:
            following = page.parent.pages[number]
        except IndexError:
            break
        # pages may share the arrays of their tags in the file
        tag_bytes += sum(tag.valuebytecount for tag in following.tags)
        if tag_bytes > MAX_TAG_BYTES:
            raise ShardError(f"its tags have more than {MAX_TAG_BYTES} bytes")
        pages.append(following)
        kinds = [(each.hash, each.shape, each.jpegtables, each.jpegheader) for each in (page, following)]
        if number < count and (kinds[0] != kinds[1] or tiff_orientation(following) != tiff_orientation(page)):
            raise ShardError(
                f"page {number + 1} differs from the first in size, type or compression, so pages cannot be channels"
            )
    if len(pages) not in (1, count):
        found = f"more than {count}" if len(pages) > count else str(len(pages))
        raise ShardError(f"it has {found} pages of {PixelFormat(1, str(page.dtype))}, not {pixels}")
    return pages


def check_tiff(page: Any, pixels: PixelFormat, num_bytes: int) -> npt.NDArray[np.uint64]:
    """Return offset and length of each tile or strip of a page of a file of ``num_bytes``, [num_parts, 2].

    Nothing is decoded. The whole page may be larger than ``MAX_DECODED_BYTES``, a tile or strip of it may not.

    Raises:
        ShardError: the page has another format, is truncated, or cannot be decoded.
    """
    _require_supported(page)
    if page.photometric == _PALETTE:
        raise ShardError("a TIFF with a palette has no channels; convert it to RGB or grey")
    if (found := PixelFormat(page.samplesperpixel, str(page.dtype))) != pixels:
        raise ShardError(f"it has {found}, not {pixels}")
    if part_bytes(page) > MAX_DECODED_BYTES or page.imagedepth != 1:
        raise ShardError(f"its tiles or strips of {'x'.join(map(str, page.chunks))} samples are too large")
    if page.planarconfig not in (CONTIGUOUS, SEPARATE):
        raise ShardError(f"its planar configuration is {page.planarconfig}, which is not defined")
    if len(page.dataoffsets) != len(page.databytecounts):
        raise ShardError("it is truncated, or tiles are missing")
    # arrays, because there may be millions of parts
    spans = np.array([page.dataoffsets, page.databytecounts], np.uint64).T
    offsets, counts = spans.T
    is_inside = (counts <= num_bytes) & (offsets <= np.uint64(num_bytes) - np.minimum(counts, num_bytes))
    if len(spans) < math.prod(page.chunked) or not (spans.all() and is_inside.all()):
        raise ShardError("it is truncated, or tiles are missing")
    return spans[: math.prod(page.chunked)]


def part_bytes(page: Any) -> int:
    """Return the number of bytes of a decoded tile or strip of a page."""
    # the shape of a part includes its samples
    return math.prod(page.chunks) * int(page.dtype.itemsize)


def invert_white(values: Array, page: Any) -> Array:
    """Return values of a page with white as the largest value: integers of a white-is-zero page are inverted."""
    if page.photometric != _WHITE_IS_ZERO or values.dtype == np.float32:
        return values
    return ((1 << page.bitspersample) - 1 - values).astype(values.dtype)


def tiff_orientation(page: Any) -> int:
    """Return the orientation of a page: 1 to 8, 1 if there is none."""
    turn = page.tags.valueof(_ORIENTATION_TAG, default=1)
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def read_npy_header(
    payload: bytes, dtypes: Sequence[str] = tuple(DTYPES)
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return shape, order, dtype and the start of the data, which the file holds exactly.

    Raises:
        ShardError: no such file, too large, or of a type that is not in ``dtypes``.
    """
    file = io.BytesIO(payload[:_MAX_NPY_HEADER])
    try:
        version = np.lib.format.read_magic(file)
        readers: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = readers[version](file, max_header_size=_MAX_NPY_HEADER)
    except Exception as error:  # the header is a Python literal, which can fail in many ways
        raise ShardError("its header cannot be read") from error
    if dtype.newbyteorder("=").name not in dtypes:
        raise ShardError(f"an array of {dtype} is not supported; convert it to {', '.join(dtypes)}")
    needed = math.prod(shape) * dtype.itemsize
    if needed > MAX_DECODED_BYTES or file.tell() + needed != len(payload):
        raise ShardError(f"its header promises {needed} bytes of values, the file has {len(payload) - file.tell()}")
    return shape, is_fortran, dtype, file.tell()


def array_layout(shape: tuple[int, ...], channels: int) -> tuple[int, int, bool]:
    """Return height and width of an array, and whether its first axis holds the channels.

    Raises:
        ShardError: the shape is not that of an image of ``channels`` channels.
    """
    if len(shape) == 2 and channels == 1:
        return shape[0], shape[1], False
    if len(shape) == 3 and shape[2] == channels:
        return shape[0], shape[1], False
    if len(shape) == 3 and shape[0] == channels:
        return shape[1], shape[2], True
    raise ShardError(f"an array of shape {list(shape)} is not an image of {channels} channels")


@contextmanager
def open_tiff(file: BinaryIO) -> Iterator[Any]:
    """Yield the first page of a TIFF, a ``tifffile.TiffPage``; errors inside the block become a ShardError."""
    try:
        import tifffile
    except ImportError:
        raise ShardError(EXTRA) from None
    _silence()
    with one_line_errors(), tifffile.TiffFile(file) as tiff:
        yield tiff.pages.first


def _require_supported(page: Any) -> None:
    if not all(isinstance(side, int) for side in (page.imagewidth, page.imagelength)):
        raise ShardError("its width or height is not one whole number")
    if str(page.dtype) not in DTYPES or not 1 <= page.samplesperpixel <= MAX_CHANNELS:
        raise ShardError(
            f"a TIFF of {page.samplesperpixel} samples of {page.dtype} is not supported; convert it to "
            f"{', '.join(DTYPES)}"
        )


@functools.cache
def _silence() -> None:
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
