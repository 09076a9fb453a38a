"""Image files that differ in how they are encoded, and corrupt ones, for the decoders."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, features

SIDE = 224
# more pixels than nvJPEG decodes with the Huffman decoder of the CPU
LARGE = (1600, 1200)


def draw_image(number: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Return an RGB image unique to ``number``: smooth colours with a little noise, as in photographs."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray((smooth + draw.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def good_images(count: int) -> dict[str, bytes]:
    """Return usual JPEGs of different sizes and qualities."""
    draw = np.random.default_rng(0)
    return {
        f"good {number}": encode(
            draw_image(number, *(int(side) for side in draw.integers(SIDE, 2 * SIDE, 2))),
            "JPEG", quality=int(draw.integers(70, 96)),
        )
        for number in range(count)
    }  # fmt: skip


def odd_images() -> dict[str, bytes]:
    """Return unusual files that can be decoded."""
    rgb = draw_image(100)
    grey, alpha = rgb.convert("L"), rgb.convert("RGBA")
    alpha.putalpha(grey)
    files = {
        "JPEG progressive": encode(rgb, "JPEG", progressive=True),
        "JPEG progressive grey": encode(grey, "JPEG", progressive=True),
        "JPEG grey": encode(grey, "JPEG"),
        "JPEG 4:4:4": encode(rgb, "JPEG", subsampling=0),
        "JPEG 4:2:2": encode(rgb, "JPEG", subsampling=1),
        "JPEG quality 10": encode(rgb, "JPEG", quality=10),
        "JPEG restart markers": encode(rgb, "JPEG", restart_marker_blocks=4),
        "JPEG CMYK": encode(rgb.convert("CMYK"), "JPEG"),
        "JPEG CMYK progressive": encode(rgb.convert("CMYK"), "JPEG", progressive=True),
        "JPEG 1x1": encode(draw_image(101, 1, 1), "JPEG"),
        "JPEG 17x13": encode(draw_image(102, 17, 13), "JPEG"),
        "JPEG 5x640": encode(draw_image(103, 5, 640), "JPEG"),
        "JPEG large": encode(draw_image(104, *LARGE), "JPEG"),
        "JPEG large progressive": encode(draw_image(105, *LARGE), "JPEG", progressive=True),
        "JPEG bytes after the end": encode(rgb, "JPEG") + b"more bytes",
        "PNG 16 bits": _png16(np.asarray(rgb, np.uint16) * 257 + 3),
        "PNG 16 bits grey": encode(Image.fromarray(np.asarray(grey, np.uint16) * 257), "PNG"),
        "PNG alpha": encode(alpha, "PNG"),
        "PNG palette": encode(rgb.convert("P"), "PNG"),
        "PNG 1 bit": encode(rgb.convert("1"), "PNG"),
        "PNG 1x1": encode(draw_image(106, 1, 1), "PNG"),
        "WEBP": encode(rgb, "WEBP"),
        "GIF": encode(rgb.convert("P"), "GIF"),
        "BMP": encode(rgb, "BMP"),
        "TIFF LZW": encode(rgb, "TIFF", compression="tiff_lzw"),
        "JPEG 2000": encode(rgb, "JPEG2000"),
    }
    if features.check("avif"):
        files["AVIF"] = encode(rgb, "AVIF")
    for orientation in (2, 3, 5, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"JPEG orientation {orientation}"] = encode(draw_image(107, SIDE, SIDE - 24), "JPEG", exif=exif)
    return files


def corrupt_images() -> dict[str, bytes]:
    """Return files that no decoder must accept."""
    rgb = draw_image(200)
    jpeg, png = encode(rgb, "JPEG"), encode(rgb, "PNG")
    broken = bytearray(png)
    broken[len(broken) // 2] ^= 4
    huffman = bytearray(jpeg)
    # more codes of one bit than there are
    huffman[jpeg.index(b"\xff\xc4") + 5] = 0xFF
    return {
        "JPEG truncated": jpeg[: len(jpeg) // 2],
        "JPEG only its header": jpeg[: jpeg.index(b"\xff\xda")],
        "JPEG wrong Huffman table": bytes(huffman),
        "JPEG of no size": _with_jpeg_size(jpeg, 0, 0),
        "JPEG of huge size": _with_jpeg_size(jpeg, 65_000, 65_000),
        "PNG truncated": png[: len(png) // 2],
        "PNG broken": bytes(broken),
        "PNG of huge size": _with_png_size(png, 60_000, 60_000),
        "PNG header before a JPEG": png[:33] + jpeg,
        "text": b"this is a text file and no photograph",
        "empty": b"",
    }


def _png16(pixels: np.ndarray) -> bytes:
    """Return a PNG of uint16 [height, width, 3], which Pillow cannot write."""
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, content) for kind, content in chunks)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _with_png_size(png: bytes, width: int, height: int) -> bytes:
    return png[:8] + _png_chunk(b"IHDR", struct.pack(">II", width, height) + png[24:29]) + png[33:]


def _with_jpeg_size(jpeg: bytes, width: int, height: int) -> bytes:
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]
