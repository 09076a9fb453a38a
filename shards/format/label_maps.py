"""Decode files with one value per pixel of an image: class ids and depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.format.decode import DEFAULT_MAX_PIXELS, load_pixels, read_bounded
from shards.format.image_files import one_line_errors
from shards.format.imagery import load_npy, read_npy_header
from shards.format.pixels import PixelFormat
from shards.format.tar_members import MAP_EXTENSIONS

Array = npt.NDArray[np.int16] | npt.NDArray[np.float32]
MAX_CLASSES = 1024
# mark of a pixel without a class
UNLABELLED = -1
# class id of an unlabelled pixel, by bytes per pixel
_IGNORED = {1: 255, 2: 65_535}
_NPY, _PNG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
_MILLIMETRES = np.float32(1000.0)


def decode_class_ids(payload: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> npt.NDArray[np.int16]:
    """Decode a mask: a grey PNG of 1 to 16 bits, or a PNG with a palette, whose indices are the ids.

    Returns:
        [height, width], in 0..``MAX_CLASSES`` - 1; ``UNLABELLED`` where a file of at most 8 bits has 255, or one of 16
        bits 65535.

    Raises:
        ShardError: not such a PNG, damaged, too large, or an id is too large.
    """
    values = _decode_png(payload, max_pixels, "class ids", "a PNG")
    is_labelled = values != _IGNORED[values.dtype.itemsize]
    if is_labelled.any() and (largest := int(values[is_labelled].max())) >= MAX_CLASSES:
        raise ShardError(f"it has the class id {largest}, the largest possible is {MAX_CLASSES - 1}; renumber the ids")
    # in the wider type first: uint8 has no negative values
    return np.where(is_labelled, values.astype(np.int32), UNLABELLED).astype(np.int16)


def decode_depth(payload: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> npt.NDArray[np.float32]:
    """Decode a depth map: a ``.npy`` of float32, or a PNG of 16 bits in millimetres.

    Returns:
        [height, width], metres for a PNG and the stored values for an array; 0 where the depth is unknown: not above
        0, NaN or infinite.

    Raises:
        ShardError: not such a file, damaged, or too large.
    """
    if payload.startswith(_NPY):
        depth_pixels = PixelFormat(1, "float32")
        with one_line_errors():
            # checks the type and the size before the values are read
            read_npy_header(payload, (depth_pixels.dtype,))
            read_bounded(payload, max_pixels, depth_pixels)
            values = load_npy(payload, depth_pixels)[..., 0]
    else:
        stored = _decode_png(payload, max_pixels, "depth", "a .npy or a PNG")
        if stored.dtype != np.uint16:
            raise ShardError("a depth map as PNG needs 16 bits, in millimetres")
        values = stored / _MILLIMETRES
    return np.where(np.isfinite(values) & (values > 0), values, 0).astype(np.float32)


def _decode_png(
    payload: bytes, max_pixels: int, content: str, formats: str
) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Return the stored values or palette indices [height, width]; ``content`` and ``formats`` are for messages."""
    if not payload.startswith(_PNG):
        raise ShardError(f"{content} must be {formats}" if payload else "the file is empty")
    decoded = load_pixels(payload, max_pixels)
    bits, color = payload[24], payload[25]
    with one_line_errors():
        if color == 3:
            return np.asarray(decoded.images[0])
        if color != 0:
            raise ShardError(
                f"it is a picture in colour or with alpha, not {content}; store one value per pixel as a grey PNG or "
                "with a palette"
            )
        values = decoded.read_values(0, decoded.images[0].size[1])[..., 0]
        # few bits are decoded as shades from 0 to 255
        return values if bits >= 8 else values // np.uint8(255 // ((1 << bits) - 1))


@dataclass(frozen=True)
class MapKind:
    """A kind of map.

    Attributes:
        name: in extensions of members and in manifests.
        title: for messages.
        decode: decodes a file.
        missing: value of a pixel without a label.
    """

    name: str
    title: str
    decode: Callable[[bytes], Array]
    missing: int

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of files, the preferred one first."""
        return tuple(extension.removeprefix(self.name) for extension in MAP_EXTENSIONS[self.name])

    def decode_for(self, payload: bytes, width: int, height: int) -> Array:
        """Decode the map of an image that has ``width`` x ``height`` pixels upright.

        Raises:
            ShardError: as ``decode``, or the map has another shape than the image.
        """
        values = self.decode(payload)
        rows, columns = values.shape
        # a map of another resolution has the same aspect but for the rounding of a side
        if abs(columns * height - width * rows) > max(columns, rows, width, height):
            raise ShardError(
                f"it has {columns}x{rows} pixels, its image {width}x{height}: the shape must be the same; make the map "
                "for the upright image"
            )
        return values


CLASS_IDS = MapKind("seg", "mask", decode_class_ids, UNLABELLED)
DEPTH = MapKind("depth", "depth map", decode_depth, 0)
MAP_KINDS = {kind.name: kind for kind in (CLASS_IDS, DEPTH)}
