"""Image files of every format, mode and compression that matters to a decoder, drawn with a fixed seed."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, features

SIDE = 48
_XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def drawn_pixels(channels: int, dtype: type = np.uint8, side: int = SIDE) -> np.ndarray:
    """Return smooth pixels over the whole range of the dtype: [side, side, channels], or [side, side] for one."""
    tiles = np.random.default_rng(channels).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(tiles).resize((side, side), Image.Resampling.BICUBIC)).astype(np.uint16)
    values = smooth * 257 + np.arange(side, dtype=np.uint16)[:, None] if dtype is np.uint16 else smooth
    return np.ascontiguousarray(values[..., 0] if channels == 1 else values[..., :channels]).astype(dtype)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels: np.ndarray, color: int, depth: int, before_data: bytes = b"") -> bytes:
    """Return a PNG; ``pixels`` are uint8 or uint16 [height, width, samples], packed where ``depth`` is below 8."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    if depth < 8:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(height, -1), axis=-1)
    else:
        packed = rows.astype(">u2" if depth == 16 else np.uint8).view(np.uint8)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = png_chunk(b"IHDR", header) + before_data + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff16(pixels: np.ndarray, order: str = "<", photometric: int = 2, extra: int | None = None) -> bytes:
    """Return an uncompressed TIFF of uint16 [height, width, channels]."""
    height, width, channels = pixels.shape
    data = pixels.astype(order + "u2").tobytes()
    tags = [(256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, 1), (262, 3, 1, photometric), (277, 3, 1, channels),
            (278, 4, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    if extra is not None:
        tags.append((338, 3, 1, extra))
    at = 8 + 2 + 12 * (len(tags) + 2) + 4
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    tags += [(258, 3, channels, at if channels > 2 else 16), (273, 4, 1, at + len(bits))]
    entries = b"".join(
        struct.pack(order + "HHI", tag, kind, num)
        + (struct.pack(order + "HH", value, value) if kind == 3 and num <= 2 else struct.pack(order + "I", value))
        for tag, kind, num, value in sorted(tags)
    )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return start + struct.pack(order + "H", len(tags)) + entries + bytes(4) + bits + data


def exif_orientation(value: int, *odd: tuple[int, int, int, bytes]) -> bytes:
    """Return EXIF with an orientation and other entries (tag, type, count, content)."""
    entries = sorted([(0x0112, 3, 1, struct.pack(">H", value)), *odd])
    directory = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + directory + bytes(4)


def image_files() -> dict[str, bytes]:
    """Return files by name; the names tell format, mode and compression."""
    grey, rgb, rgba = (Image.fromarray(drawn_pixels(channels)) for channels in (1, 3, 4))
    images = {
        "L": grey, "RGB": rgb, "RGBA": rgba, "LA": rgba.convert("LA"), "P": rgb.convert("P"), "1": grey.convert("1"),
        "CMYK": rgb.convert("CMYK"), "YCbCr": rgb.convert("YCbCr"),
        "I;16": Image.fromarray(drawn_pixels(1, np.uint16)), "F": Image.fromarray(drawn_pixels(1).astype(np.float32)),
        "I": Image.fromarray(drawn_pixels(1).astype(np.int32) * 1000), "LAB": None,
    }  # fmt: skip
    files = {}
    writes = {
        "JPEG": (["L", "RGB", "CMYK"], [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}]),
        "PNG": (["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], [{}]),
        "WEBP": (["RGB", "RGBA"], [{"quality": 90}, {"lossless": True}]),
        "GIF": (["L", "P", "RGBA"], [{}]),
        "BMP": (["1", "L", "P", "RGB"], [{}]),
        "PPM": (["1", "L", "RGB", "I;16"], [{}]),
        "TGA": (["L", "P", "RGB", "RGBA", "LA"], [{}, {"compression": "tga_rle"}]),
        "JPEG2000": (["L", "RGB", "RGBA", "LA"], [{}]),
        "TIFF": (
            ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F", "I"],
            [{"compression": name} for name in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma")],
        ),
    }
    if features.check("avif"):
        writes["AVIF"] = (["RGB", "RGBA", "L"], [{}])
    for kind, (modes, variants) in writes.items():
        for mode in modes:
            for options in variants:
                text = " ".join(f"{key}={value}" for key, value in options.items())
                files[f"{kind} {mode} {text}".strip()] = saved(images[mode], kind, **options)
    files["TIFF RGB jpeg"] = saved(rgb, "TIFF", compression="jpeg")
    files["TIFF 1 group4"] = saved(images["1"], "TIFF", compression="group4")
    for order in "<>":
        for channels, photometric, extra in ((3, 2, None), (4, 2, 2), (1, 0, None), (1, 1, None)):
            pixels = drawn_pixels(channels, np.uint16).reshape(SIDE, SIDE, channels)
            files[f"TIFF 16 bits {order} {channels} channels {photometric}"] = tiff16(pixels, order, photometric, extra)
    for orientation in range(1, 9):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            exif = Image.Exif()
            exif[0x0112] = orientation
            files[f"{kind} orientation {orientation}"] = saved(rgb, kind, exif=exif)
    files["JPEG odd EXIF"] = saved(rgb, "JPEG", exif=exif_orientation(6, (0x0128, 2, 2, b"2\0")))
    files["JPEG XMP orientation"] = saved(rgb, "JPEG", xmp=_XMP)
    files["JPEG short EXIF"] = saved(rgb, "JPEG", exif=exif_orientation(6)[:-9])
    files["WEBP XMP orientation"] = saved(rgb, "WEBP", xmp=_XMP)
    text = b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP
    files["PNG XMP orientation"] = png(drawn_pixels(3), 2, 8, png_chunk(b"iTXt", text))
    raw = b"exif".rjust(5, b"\n") + b"\n" + str(len(exif_orientation(8))).encode() + b"\n"
    raw += exif_orientation(8).hex().encode() + b"\n"
    files["PNG raw profile"] = png(
        drawn_pixels(3), 2, 8, png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))
    )
    files["PNG text bomb"] = png(drawn_pixels(3), 2, 8, png_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2 << 20), 9)))
    files["PNG profile bomb"] = png(
        drawn_pixels(3), 2, 8, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2 << 20), 9))
    )
    for depth in (2, 4):
        files[f"PNG grey {depth} bits"] = png(drawn_pixels(1) >> (8 - depth), 0, depth)
    for color, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        files[f"PNG 16 bits {channels} channels"] = png(drawn_pixels(channels, np.uint16), color, 16)
    clear = drawn_pixels(3)[5, 5]
    files["PNG clear colour"] = png(drawn_pixels(3), 2, 8, png_chunk(b"tRNS", struct.pack(">HHH", *clear.tolist())))
    files["PNG clear grey"] = png(drawn_pixels(1) >> 4, 0, 4, png_chunk(b"tRNS", struct.pack(">H", 7)))
    palette = images["P"].getpalette("RGB")
    files["PNG palette alpha"] = png(
        np.asarray(images["P"]), 3, 8, png_chunk(b"PLTE", bytes(palette)) + png_chunk(b"tRNS", bytes(range(0, 256, 3)))
    )
    files["GIF animated"] = saved(rgb, "GIF", save_all=True, append_images=[rgba.convert("RGB")])
    files["PNG animated"] = saved(rgb, "PNG", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))])
    files["PNG frames missing"] = png(drawn_pixels(3), 2, 8, png_chunk(b"acTL", struct.pack(">II", 2, 0)))
    files["WEBP animated"] = saved(rgb, "WEBP", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE))])
    jpeg = saved(rgb, "JPEG")
    files["JPEG FF00 header"] = jpeg[:2] + b"\xff\0" + jpeg[2:]
    files["JPEG short APP14"] = jpeg[:2] + b"\xff\xee\0\x0bAdobe\0\x64\0\0" + jpeg[2:]
    files["JPEG junk after the end"] = jpeg + b"more bytes"
    files["JPEG truncated"] = jpeg[: len(jpeg) // 2]
    files["JPEG truncated, ended"] = jpeg[: len(jpeg) // 2] + b"\xff\xd9"
    broken = bytearray(saved(rgb, "PNG"))
    broken[len(broken) // 2] ^= 4
    files["PNG broken"] = bytes(broken)
    files["PNG truncated"] = saved(rgb, "PNG")[:-20]
    files["PostScript"] = b"%!PS-Adobe-3.0 EPSF-3.0\n{ 1 pop } loop\n"
    files["text"] = b"this is a text file and no photograph"
    return files
