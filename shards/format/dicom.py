"""Stored values of single-frame monochrome DICOM images, parsed by pydicom and decompressed by imagecodecs.

MONOCHROME1, whose smallest value is white, is inverted within its stored bits; then slope and intercept apply. Integer
sets take only images without a rescaling. No other attribute of the file is used. Files are untrusted: sizes are
checked before memory is allocated, and a syntax that compresses the whole file is refused before the file is parsed.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import math
import struct
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.format import image_header
from shards.format.image_files import one_line_errors
from shards.format.image_header import Header
from shards.format.pixels import PixelFormat

Array = npt.NDArray[Any]

DICOM = "DICOM"
SUFFIX = ".dcm"
_EXTRA = "DICOM files need pydicom and imagecodecs: pip install 'streamtrain[dicom]'"
_PREAMBLE = 128
_LONG_KINDS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV")
_SYNTAX_TAG = (2, 0x10)
_MAX_META_ELEMENTS = 64
_PREFIX = "1.2.840.10008.1.2"
_RAW = ("", ".1")
_RLE = ".5"
_JPEG = (".4.50", ".4.51", ".4.57", ".4.70")
_JPEG_LS = (".4.80", ".4.81")
_JPEG_2000 = (".4.90", ".4.91", ".4.201", ".4.202", ".4.203")
# of JPEG and JPEG-LS; others in this range are tables
_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def require_extra() -> None:
    """Raise a ShardError if a library that decodes these images is not installed."""
    if not all(map(importlib.util.find_spec, ("pydicom", "imagecodecs"))):
        raise ShardError(_EXTRA)


def is_dicom(payload: bytes) -> bool:
    return payload[_PREAMBLE : _PREAMBLE + 4] == b"DICM"


def read_header(payload: bytes) -> Header:
    """Read the header of a DICOM file; raises as ``decode``."""
    dataset = _parse(payload, has_pixels=False)[0]
    with one_line_errors():
        _check_kind(dataset)
        return Header(DICOM, int(dataset.Columns), int(dataset.Rows), 1, True)


def load_dicom(payload: bytes, pixels: PixelFormat) -> Array:
    """Return the image of a DICOM file as [height, width, 1]; raises as ``decode``."""
    dataset, syntax = _parse(payload, has_pixels=True)
    with one_line_errors():
        _check_kind(dataset)
        if not dataset.get("PixelData"):
            raise ShardError("a DICOM file without integer pixels")
        bits, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
        slope, intercept = (_number(dataset.get(name), default) for name, default in _RESCALE)
        is_signed = int(dataset.PixelRepresentation) == 1
        if pixels.channels != 1:
            raise ShardError(f"it has 1 channel, not {pixels}")
        if pixels.dtype != "float32":
            if (slope, intercept) != (1, 0):
                raise ShardError(f"it has a slope of {slope:g} and an intercept of {intercept:g}; pack as float32")
            if is_signed or f"uint{bits}" != pixels.dtype:
                raise ShardError(f"it has values of {'int' if is_signed else 'uint'}{bits}, not {pixels.dtype}")
        values = _decompress(dataset, syntax).view(f"uint{bits}")
        if is_signed:
            values = (values << (bits - stored)).view(f"int{bits}") >> (bits - stored)
        else:
            values = values & ((1 << stored) - 1)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            values = -1 - values if is_signed else (1 << stored) - 1 - values
        if pixels.dtype == "float32":
            values = (values.astype(np.float64) * slope + intercept).astype(np.float32)
        return values[..., None]


_RESCALE = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))


def _number(value: Any, default: float) -> float:
    return default if value is None else float(value)


def _parse(payload: bytes, has_pixels: bool) -> tuple[Any, str]:
    """Return the data set, and the transfer syntax without its prefix."""
    uid = _find_syntax(payload)
    syntax = uid.removeprefix(_PREFIX)
    if not uid.startswith(_PREFIX) or syntax not in (*_RAW, _RLE, *_JPEG, *_JPEG_LS, *_JPEG_2000):
        raise ShardError(f"a DICOM file of transfer syntax {uid or 'unknown'} is not supported")
    try:
        import pydicom
    except ImportError:
        raise ShardError(_EXTRA) from None
    _silence()
    with one_line_errors():
        return pydicom.dcmread(io.BytesIO(payload), stop_before_pixels=not has_pixels), syntax


def _find_syntax(payload: bytes) -> str:
    """Return the transfer syntax from the file's first group, which is never compressed; empty if it is missing."""
    at = _PREAMBLE + 4
    for _ in range(_MAX_META_ELEMENTS):
        group, element, kind = struct.unpack_from("<HH2s", payload.ljust(at + 12, b"\0"), at)
        if group != 2:
            break
        if kind in _LONG_KINDS:
            (length,), start = struct.unpack_from("<I", payload.ljust(at + 12, b"\0"), at + 8), at + 12
        else:
            (length,), start = struct.unpack_from("<H", payload.ljust(at + 12, b"\0"), at + 6), at + 8
        if (group, element) == _SYNTAX_TAG:
            return payload[start : start + min(length, 64)].rstrip(b"\0 ").decode("ascii", "replace")
        at = start + length
        if at > len(payload):
            break
    return ""


def _check_kind(dataset: Any) -> None:
    """Raise a ShardError unless it is a single monochrome frame of 8 or 16 allocated bits, without tables."""
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise ShardError(f"a DICOM file of {dataset.NumberOfFrames} frames; only single frames are supported")
    # their slope and intercept are stored per frame
    if "SharedFunctionalGroupsSequence" in dataset or "PerFrameFunctionalGroupsSequence" in dataset:
        raise ShardError("an enhanced multi-frame DICOM object; convert it to single frames")
    kind = str(dataset.PhotometricInterpretation)
    if kind not in ("MONOCHROME1", "MONOCHROME2") or int(dataset.SamplesPerPixel) != 1:
        raise ShardError(f"a DICOM image of kind {kind}; only monochrome ones are supported")
    if "ModalityLUTSequence" in dataset:
        raise ShardError("a DICOM image with a modality lookup table is not supported")
    bits, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    if bits not in (8, 16) or not 1 <= stored <= bits or int(dataset.HighBit) != stored - 1:
        raise ShardError(f"a DICOM image of {stored} bits in {bits} is not supported")


def _decompress(dataset: Any, syntax: str) -> Array:
    """Return the pixels as stored: contiguous [rows, columns] of the allocated bits, unsigned."""
    import imagecodecs
    from pydicom.encaps import generate_frames

    shape = int(dataset.Rows), int(dataset.Columns)
    dtype = np.dtype(f"<u{int(dataset.BitsAllocated) // 8}")
    payload: bytes = dataset.PixelData
    if syntax in _RAW:
        if len(payload) < (needed := math.prod(shape) * dtype.itemsize):
            raise ShardError(f"it is truncated: {len(payload)} bytes of pixels, its header promises {needed}")
        values: Array = np.frombuffer(payload, dtype, math.prod(shape)).reshape(shape)
        return values.astype(dtype.newbyteorder("="))
    payload = next(generate_frames(payload, number_of_frames=1))
    if syntax == _RLE:
        num_bytes = math.prod(shape) * dtype.itemsize
        native = dtype.newbyteorder("=")
        values = np.frombuffer(imagecodecs.dicomrle_decode(payload, native, out=num_bytes), native)
        if values.nbytes != num_bytes:
            raise ShardError("it is truncated, or has more pixels than its header says")
        return values.reshape(shape).copy()
    if (found := _frame_size(payload, syntax)) != shape:
        raise ShardError(f"its header has {shape[1]}x{shape[0]} pixels, the image in it {found[1]}x{found[0]}")
    decoders = {_JPEG: imagecodecs.jpeg_decode, _JPEG_LS: imagecodecs.jpegls_decode}
    decoder = next((each for kinds, each in decoders.items() if syntax in kinds), imagecodecs.jpeg2k_decode)
    values = np.ascontiguousarray(decoder(payload))
    if values.shape != shape or values.dtype.kind not in "iu" or values.dtype.itemsize > dtype.itemsize:
        raise ShardError(f"it has {values.dtype} of shape {list(values.shape)}, which its header does not say")
    return values if values.dtype.itemsize == dtype.itemsize else values.astype(f"uint{8 * dtype.itemsize}")


def _frame_size(payload: bytes, syntax: str) -> tuple[int, int]:
    """Return rows and columns of a JPEG, JPEG-LS or JPEG 2000 image from its own header."""
    if syntax in _JPEG_2000:
        header = image_header.read_header(payload)
        return header.height, header.width
    at = 2
    while at + 9 <= len(payload) and payload[at] == 0xFF:
        if payload[at + 1] in _FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", payload, at + 5)
            return height, width
        at += 2 + int.from_bytes(payload[at + 2 : at + 4], "big")
    raise ShardError("the header of the image in it cannot be read")


@functools.cache
def _silence() -> None:
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
