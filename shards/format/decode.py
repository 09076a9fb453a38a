"""Decode images to the same pixels in packing, verification, training, evaluation and pictures.

In training, DALI decodes plain JPEG, PNG and WebP to the same pixels (``image_header.Header.needs_host``). The rules
for every format:

- 8 bits a channel: a wider image of white W becomes ``round(v * 255 / W)``; floats, which have no defined white, are
  refused.
- Three channels: grey is repeated, palettes are looked up, CMYK is converted without a colour profile. Colour profiles
  and gamma are ignored.
- Alpha (a channel, in a palette, or a transparent colour) is then composited on a background, rounded to nearest.
- The orientation in EXIF, or in XMP where EXIF has none, is applied.
- Animations and multi-page files give their first frame.

All of this is for 8-bit RGB. For any other ``PixelFormat``, values and channels stay as the file stores them, alpha
included, and a file of another format is refused; only the orientation is applied.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from shards.errors import ShardError
from shards.format import dicom, imagery, jpeg_damage
from shards.format.image_files import one_line_errors, open_as
from shards.format.image_header import SIDEWAYS, Header, find_orientation, png_chunks
from shards.format.pixels import RGB, PixelFormat

DEFAULT_MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
WHITE = (255, 255, 255)
Color = tuple[int, int, int]
Array = npt.NDArray[Any]  # uint8 or uint16; float32 only outside 8-bit RGB

_BAND_PIXELS = 1 << 21  # pixels converted at a time, to bound the memory of the conversion
_RGB_MODES = ("L", "RGB", "LA", "RGBA")
_CONVERTED_MODES = {"1": "L", "RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANES = 258, 262, 284
_WHITE_IS_ZERO = 0
_WIDE_GREY_FORMATS = ("PPM", "PNG")  # whose mode I has 16 bits
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by colour type
# column and row of the first pixel of each pass of an interlaced PNG, and the distances to the next ones
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


@dataclass(frozen=True)
class Decoded:
    """The pixels of a file as it stores them.

    Attributes:
        header: of the file.
        images: loaded images of the stored width and height, which together hold the pixels.
        read: turns the same rows of each image into integers [rows, width, channels], with 1 (grey), 2 (grey, alpha),
            3 (RGB) or 4 (RGB, alpha) channels.
        mode: Pillow's name for the kind of pixels in the file.
        white: the value of white and of full opacity: 255, or more for images of more than 8 bits.
    """

    header: Header
    images: tuple[Image.Image, ...]
    read: Callable[..., Array]
    mode: str
    white: int = 255

    def bands(self) -> list[tuple[int, int]]:
        width, height = self.images[0].size
        rows = max(1, _BAND_PIXELS // width)
        return [(top, min(top + rows, height)) for top in range(0, height, rows)]

    def read_band(self, top: int, bottom: int) -> npt.NDArray[np.uint8]:
        """Return rows ``top`` to ``bottom`` as uint8 [rows, width, channels]."""
        return scale_to_8_bit(self.read_values(top, bottom), self.white)

    def read_values(self, top: int, bottom: int) -> Array:
        """Return rows ``top`` to ``bottom`` [rows, width, channels] of values from 0 to ``white``."""
        width, height = self.images[0].size
        is_whole = (top, bottom) == (0, height)
        parts = (np.asarray(im if is_whole else im.crop((0, top, width, bottom))) for im in self.images)
        band = self.read(*parts)
        return band[..., None] if band.ndim == 2 else band


def decode(
    payload: bytes,
    *,
    background: Color | None = WHITE,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    pixels: PixelFormat = RGB,
) -> Array:
    """Decode an image file to [height, width, channels] of the dtype of ``pixels``, upright.

    Args:
        background: colour that transparent RGB images are composited on; None drops the alpha channel.
        max_pixels: images with more pixels are refused before they are decoded.
        pixels: 8-bit RGB, to which images are converted, or the format that the file must have.

    Raises:
        ShardError: not an image, truncated, damaged, too large, without a defined white or of another pixel format;
            gives the reason.
    """
    if not pixels.is_rgb:
        return _decode_values(payload, max_pixels, pixels)
    decoded = load_pixels(payload, max_pixels)
    with one_line_errors():
        return to_rgb(decoded, background)


def _decode_values(payload: bytes, max_pixels: int, pixels: PixelFormat) -> Array:
    header = read_bounded(payload, max_pixels, pixels)
    with one_line_errors():
        if header.format in _VALUE_LOADERS:
            values = _VALUE_LOADERS[header.format](payload, pixels)
        else:
            decoded = load_pixels(payload, max_pixels)
            values = np.concatenate([decoded.read_values(*band) for band in decoded.bands()])
        if (found := PixelFormat(values.shape[-1], values.dtype.name)) != pixels:
            raise ShardError(f"it has {found}, not {pixels}")
        if pixels.dtype == "float32" and not np.isfinite(values).all():
            raise ShardError("it has NaN or infinite values; replace them before packing")
        # torch warns of read-only memory, such as the payload
        return np.require(turn_upright(values, header.orientation), requirements=["C", "W"])


_VALUE_LOADERS = {"TIFF": imagery.load_tiff, imagery.NPY: imagery.load_npy, dicom.DICOM: dicom.load_dicom}


def read_bounded(payload: bytes, max_pixels: int, pixels: PixelFormat = RGB) -> Header:
    """Read the header of an image of at most ``max_pixels``. Raises as ``decode``."""
    header = imagery.read_header(payload, pixels)
    imagery.check_size(header, pixels, max_pixels)
    return header


def load_pixels(payload: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Decoded:
    """Decode a file in full and check it for damage that decoding does not report. Raises as ``decode``."""
    header = read_bounded(payload, max_pixels)
    with one_line_errors():
        decoded = _LOADERS.get(header.format, _load_other)(payload, header)
        stored = decoded.images[0].size
        if stored not in ((header.width, header.height), (header.height, header.width)):
            raise ShardError(f"it has {stored[0]}x{stored[1]} pixels, but its header has another size")
        return decoded


def to_rgb(decoded: Decoded, background: Color | None = WHITE) -> npt.NDArray[np.uint8]:
    """Return decoded pixels as ``decode`` does."""
    width, height = decoded.images[0].size
    pixels = np.empty((height, width, 3), np.uint8)
    for top, bottom in decoded.bands():
        band = decoded.read_band(top, bottom)
        pixels[top:bottom] = composite(band, background) if band.shape[-1] in (2, 4) else band
    return np.ascontiguousarray(turn_upright(pixels, decoded.header.orientation))


def wrap_pillow(image: Image.Image) -> Decoded:
    """Return an image that another program has opened with Pillow, with its orientation.

    Raises:
        ShardError: it cannot be loaded or has no defined white; gives the reason.
    """
    with one_line_errors():
        image.load()
        turn = find_orientation(image)
        width, height = image.size
        header = Header(image.format or "", *((height, width) if turn in SIDEWAYS else (width, height)), turn, True)
        return _wrap(image, header)


def composite(pixels: npt.NDArray[np.uint8], background: Color | None) -> npt.NDArray[np.uint8]:
    """Composite uint8 [..., channels] on a background; the last channel is straight alpha.

    Returns:
        uint8 [..., channels - 1], rounded to nearest; 3 channels if the background is not grey. Without a background,
        the colours as they are.
    """
    colors, alpha = pixels[..., :-1], pixels[..., -1:]
    if background is None or bool((alpha == 255).all()):
        return colors
    behind: np.ndarray = np.array(background if len(set(background)) > 1 else background[:1], np.uint16)
    # 255 * 255 + 127 fits in 16 bits
    total = colors * alpha.astype(np.uint16) + behind * (255 - alpha) + np.uint16(127)
    return (total // np.uint16(255)).astype(np.uint8)


def scale_to_8_bit(values: Array, white: int) -> npt.NDArray[np.uint8]:
    """Scale integers from 0..``white`` to 0..255, rounded to nearest as DALI does."""
    if white == 255:
        return values.astype(np.uint8, copy=False)
    scaled = (values.astype(np.uint32) * 255 + white // 2) // white
    return np.minimum(scaled, 255).astype(np.uint8)


def turn_upright(pixels: Array, orientation: int) -> Array:
    """Return a view of [height, width, channels] with an EXIF orientation (1 to 8) applied."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def load_jpeg(payload: bytes, header: Header, max_side: int | None = None) -> Decoded:
    """Decode a JPEG; with ``max_side``, at a scale of 1/2, 1/4 or 1/8 that leaves twice as many pixels a side."""
    image = open_as("JPEG", _without_metadata(payload))
    if max_side is not None:
        image.draft(None, (2 * max_side, 2 * max_side))
    image.load()
    jpeg_damage.check(payload, image)
    return _wrap(image, header)


def _without_metadata(payload: bytes) -> bytes:
    """Return a JPEG without the segments that hold no pixels, which Pillow may fail to parse."""
    parts, at = [payload[:2]], 2
    while payload[at : at + 1] == b"\xff" and at + 4 <= len(payload):
        marker, length = payload[at + 1], payload[at + 2] << 8 | payload[at + 3]
        if marker == 0xDA:
            parts.append(payload[at:])
            return b"".join(parts)
        if marker in (0x00, 0x01, 0xFF, 0xD8, 0xD9) or 0xD0 <= marker <= 0xD7 or length < 2:
            break
        # JFIF and Adobe say which colour space the channels have
        if not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            parts.append(payload[at : at + 2 + length])
        at += 2 + length
    return payload


def _check_png_rows(payload: bytes, chunks: Sequence[tuple[bytes, int, int]], image: Image.Image) -> None:
    """Decode a PNG, and raise a ShardError if its data end before the last row: Pillow fills the rest with zeros."""
    image.load()
    width, height = image.size
    is_interlaced = payload[28] != 0
    # a last row that is not zero was decoded; with interlacing, earlier rows may be missing
    if not is_interlaced and np.asarray(image.crop((0, height - 1, width, height))).any():
        return
    bits = payload[24] * _PNG_SAMPLES[payload[25]]
    expected = 0
    for left, top, across, down in _ADAM7 if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        expected += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    inflate, found = zlib.decompressobj(), 0
    try:
        for kind, start, end in chunks:
            rest = payload[start:end] if kind == b"IDAT" else b""
            while rest and found < expected:
                found += len(inflate.decompress(rest, 1 << 20))
                rest = inflate.unconsumed_tail
    except zlib.error as error:
        raise ShardError(f"the image data are damaged ({error})") from error
    if found < expected:
        raise ShardError("the image data end before the last row")


def _load_png(payload: bytes, header: Header) -> Decoded:
    """Decode the image data with Pillow; palette, transparent colour and 16 bits follow here, without loss."""
    chunks = png_chunks(payload)
    parts = [payload[:8]]
    palette = transparency = b""
    for kind, start, end in chunks:
        if kind[:1].isupper():
            if zlib.crc32(payload[start - 4 : end]) != int.from_bytes(payload[end : end + 4], "big"):
                raise ShardError(f"the checksum of its {kind.decode('ascii', 'replace')} chunk differs")
            parts.append(payload[start - 8 : end + 4])
        if kind == b"PLTE":
            palette = payload[start : start + (end - start) // 3 * 3]
        elif kind == b"tRNS":
            transparency = payload[start:end]
    depth, color = payload[24], payload[25]
    if (depth, color) == (16, 4):
        # four bytes a pixel, as in 8-bit RGBA: high and low byte of grey and of alpha
        fields = b"IHDR" + payload[16:24] + bytes([8, 6]) + payload[26:29]
        parts[1] = struct.pack(">I", 13) + fields + struct.pack(">I", zlib.crc32(fields))
    image = open_as("PNG", b"".join(parts))
    _check_png_rows(payload, chunks, image)
    if color == 3:
        return Decoded(header, (image,), _palette_lookup(palette, transparency), image.mode)
    # the transparent colour is stored with 16 bits a channel at any depth
    scale = 255 // ((1 << depth) - 1) if depth < 8 else 1
    clear = np.frombuffer(transparency[: len(transparency) // 2 * 2], ">u2").astype(np.uint16) * np.uint16(scale)
    has_clear = color in (0, 2) and len(clear) == (1 if color == 0 else 3)
    white = 65535 if depth == 16 else 255
    if depth == 16 and color in (2, 6):
        name = "RGB" if color == 2 else "RGBA"
        low = open_as("PNG", b"".join(parts))
        _set_raw_mode(image, f"{name};16B")
        _set_raw_mode(low, f"{name};16L")  # the second byte of two
        low.load()
        images: tuple[Image.Image, ...] = (image, low)
    else:
        images = (image,)
    image.load()

    def read(*bands: np.ndarray) -> Array:
        values: np.ndarray
        if depth == 16 and color == 4:
            wide = bands[0].astype(np.uint16)
            values = wide[..., ::2] << 8 | wide[..., 1::2]
        elif len(bands) == 2:
            values = bands[0].astype(np.uint16) << 8 | bands[1]
        else:
            values = bands[0].astype(np.uint16 if depth == 16 else np.uint8, copy=False)
            if bands[0].dtype == bool:
                values = values * np.uint8(255)
        if not has_clear:
            return values
        values = values.reshape(*values.shape[:2], -1)
        alpha = np.where((values == clear).all(-1, keepdims=True), 0, white)
        return np.concatenate([values, alpha.astype(values.dtype)], -1)

    return Decoded(header, images, read, image.mode, white)


def _palette_lookup(palette: bytes, transparency: bytes) -> Callable[[np.ndarray], Array]:
    colors = np.zeros((256, 4 if transparency else 3), np.uint8)
    table = np.frombuffer(palette[:768], np.uint8).reshape(-1, 3)
    colors[: len(table), :3] = table
    if transparency:
        colors[:, 3] = 255
        alpha = np.frombuffer(transparency[:256], np.uint8)
        colors[: len(alpha), 3] = alpha
    return lambda band: colors[band.astype(np.uint8, copy=False)]


def _load_tiff(payload: bytes, header: Header) -> Decoded:
    image = open_as("TIFF", payload)
    bits = image.tag_v2.get(_TIFF_BITS, (1,))  # type: ignore[attr-defined]
    depth = max(bits) if isinstance(bits, tuple) else bits
    # Pillow unpacks separate planes as 8 bits a sample, whatever the file has
    if depth > 8 and image.tag_v2.get(_TIFF_PLANES) == 2:  # type: ignore[attr-defined]
        raise ShardError(f"a TIFF of {depth} bits in separate planes is not supported; convert it to PNG")
    raw_mode = str(image.tile[0][3][0] if isinstance(image.tile[0][3], tuple) else image.tile[0][3])
    if ";16" not in raw_mode and ";12" not in raw_mode:
        image.load()
        return _wrap(image, header)
    white = (1 << depth) - 1
    if image.mode.startswith("I;16"):
        is_inverted = image.tag_v2.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO  # type: ignore[attr-defined]
        image.load()
        return Decoded(
            header, (image,), lambda band: _as_uint16(band, white if is_inverted else None), image.mode, white
        )
    name, _, order = raw_mode.partition(";16")
    if name not in ("RGB", "RGBX", "RGBA", "CMYK") or order not in ("L", "B", "N"):
        raise ShardError(f"a TIFF of 16 bits with pixels of kind {raw_mode} is not supported; convert it to PNG")
    is_little = order == "L" or (order == "N" and np.little_endian)
    low = open_as("TIFF", payload)
    for each, letter in ((image, "L" if is_little else "B"), (low, "B" if is_little else "L")):
        _set_raw_mode(each, f"{name};16{letter}")
        each.load()

    def read(high_band: np.ndarray, low_band: np.ndarray) -> Array:
        return high_band.astype(np.uint16) << 8 | low_band

    if image.mode == "CMYK":
        bands = Decoded(header, (image, low), read, image.mode, white)
        merged = Image.fromarray(np.concatenate([bands.read_band(*band) for band in bands.bands()]), "CMYK")
        return _wrap(merged, header)
    return Decoded(header, (image, low), read, image.mode, white)


def _as_uint16(band: np.ndarray, inverted_from: int | None) -> npt.NDArray[np.uint16]:
    values = band.astype(np.uint16)
    return values if inverted_from is None else np.uint16(inverted_from) - values


def _set_raw_mode(image: ImageFile.ImageFile, raw_mode: str) -> None:
    """Choose which byte of each 16-bit sample Pillow keeps when it decodes to 8 bits."""
    for number, tile in enumerate(image.tile):
        changed = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
        # a named tuple, or a plain one in older versions of Pillow
        make: Any = getattr(type(tile), "_make", tuple)
        image.tile[number] = make((*tile[:3], changed))


def _load_other(payload: bytes, header: Header) -> Decoded:
    image = open_as(header.format, payload)
    image.load()
    return _wrap(image, header)


def _wrap(image: Image.Image, header: Header) -> Decoded:
    """Return a loaded image of any mode of Pillow."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and header.format in _WIDE_GREY_FORMATS):
        return Decoded(header, (image,), lambda band: band.astype(np.uint16), mode, 65535)
    if mode == "P" or (mode in ("1", "L", "RGB") and "transparency" in image.info):
        has_alpha = mode != "P" or "transparency" in image.info or image.palette.mode == "RGBA"  # type: ignore[union-attr]
        mode = "RGBA" if has_alpha else "RGB"
    mode = _CONVERTED_MODES.get(mode, mode)
    if mode not in _RGB_MODES:
        raise ShardError(f"pixels of mode {mode} have no defined white; convert the image to 8 or 16 bits first")
    converted = image if mode == image.mode else image.convert(mode)
    return Decoded(header, (converted,), lambda band: band, image.mode)


_LOADERS: dict[str, Callable[[bytes, Header], Decoded]] = {
    "JPEG": load_jpeg,
    "PNG": _load_png,
    "TIFF": _load_tiff,
}
