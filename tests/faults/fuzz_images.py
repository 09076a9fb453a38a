"""Readers for ``fuzz.py``: encoded images of each format, and Parquet files of images."""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from drawn_images import drawn_image, encoded
from faults.mutations import mutate_bytes
from hypothesis import strategies as st
from image_files import png_chunk
from PIL import Image, features

from shards.errors import ShardError
from shards.format import images
from shards.format.decode import decode
from shards.format.image_header import png_chunks
from shards.packing.inputs import list_inputs

HERE = Path(tempfile.mkdtemp(prefix="fuzz-images-"))
EDGES = [0, 1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1]


def draw_samples() -> dict[str, bytes]:
    """Return a small valid image in each format, mode and compression."""
    rgb = drawn_image(1, 24, 17)
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    grey16 = Image.fromarray(np.arange(24 * 17, dtype=np.uint16).reshape(17, 24) * 150)
    png = {
        "png": rgb, "alpha png": alpha, "grey alpha png": alpha.convert("LA"), "palette png": rgb.quantize(8),
        "16-bit png": grey16, "bilevel png": rgb.convert("1"),
    }  # fmt: skip
    tiff = {"tiff": rgb, "16-bit tiff": grey16, "float tiff": rgb.convert("F"), "cmyk tiff": rgb.convert("CMYK")}
    samples = {name: encoded(image, "PNG") for name, image in png.items()}
    samples |= {name: encoded(image, "TIFF") for name, image in tiff.items()}
    samples |= {kind: encoded(rgb, kind) for kind in ("JPEG", "GIF", "BMP", "PPM", "WEBP", "TGA")}
    samples |= {
        "progressive JPEG": encoded(rgb, progressive=True),
        "grey JPEG": encoded(rgb.convert("L")),
        "CMYK JPEG": encoded(rgb.convert("CMYK")),
        "transparent palette png": encoded(rgb.quantize(8), "PNG", transparency=3),
        "alpha WEBP": encoded(alpha, "WEBP", lossless=True),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma"):
        try:
            samples[f"{compression} tiff"] = encoded(rgb, "TIFF", compression=compression)
        except (OSError, ValueError, KeyError):
            continue
    for kind, name in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")):
        if features.check(name):
            samples[name] = encoded(rgb, kind)
    animation = io.BytesIO()
    rgb.save(animation, "PNG", save_all=True, append_images=[drawn_image(2, 24, 17)])
    return samples | {"animated png": animation.getvalue()}


SAMPLES = draw_samples()


def mutate_png(draw: Callable[..., Any], content: bytes) -> bytes:
    """Change, repeat, drop or swap chunks of a PNG; all checksums are right."""
    chunks = [(kind, content[start:end]) for kind, start, end in png_chunks(content)]
    at = draw(st.integers(0, len(chunks) - 1))
    kind, value = chunks[at]
    change = draw(st.sampled_from(["change", "repeat", "drop", "rename", "number", "add"]))
    if change == "change":
        chunks[at] = (kind, mutate_bytes(draw, value))
    elif change == "repeat":
        chunks[at:at] = [chunks[at]] * draw(st.sampled_from([1, 2, 1000]))
    elif change == "drop":
        del chunks[at]
    elif change == "rename":
        names = [b"tRNS", b"PLTE", b"IDAT", b"iCCP", b"eXIf", b"fdAT", b"acTL", b"fcTL", b"gAMA", b"IEND", b"XXXX"]
        chunks[at] = (draw(st.sampled_from(names)), value)
    elif change == "number" and len(value) >= 4:
        where = draw(st.integers(0, len(value) - 4))
        number = struct.pack(">I", draw(st.sampled_from(EDGES)))
        chunks[at] = (kind, value[:where] + number + value[where + 4 :])
    else:
        chunks.insert(at, (draw(st.sampled_from([b"tRNS", b"PLTE", b"eXIf", b"iTXt"])), draw(st.binary(max_size=12))))
    return content[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def mutate_jpeg(draw: Callable[..., Any], content: bytes) -> bytes:
    """Change, repeat, drop or insert a segment of a JPEG's header."""
    segments, at = [], 2
    while content[at] == 0xFF and content[at + 1] != 0xDA:
        length = 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        segments.append(content[at : at + length])
        at += length
    number = draw(st.integers(0, len(segments) - 1))
    change = draw(st.sampled_from(["change", "repeat", "drop", "add", "fill"]))
    if change == "change":
        body = mutate_bytes(draw, segments[number][4:])[:65_000]
        segments[number] = segments[number][:2] + struct.pack(">H", len(body) + 2) + body
    elif change == "repeat":
        segments[number:number] = [segments[number]] * draw(st.sampled_from([1, 2, 500]))
    elif change == "drop":
        del segments[number]
    elif change == "add":
        marker = draw(st.sampled_from([0xE0, 0xE1, 0xE2, 0xEE, 0xDD, 0xC0, 0xC2, 0xC4, 0xDB, 0x00, 0x01, 0xD8]))
        body = draw(st.binary(max_size=20))
        segments.insert(number, bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body)
    else:
        segments[number] = b"\xff" * draw(st.integers(0, 9)) + segments[number]
    scan = content[at:]
    if draw(st.booleans()):
        scan = scan[:-2] * draw(st.sampled_from([1, 2, 50])) + scan[-2:]
    return content[:2] + b"".join(segments) + scan


def mutate_tiff(draw: Callable[..., Any], content: bytes) -> bytes:
    """Change the entries of a TIFF's first directory."""
    order = "<" if content[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = start + 2 + 12 * draw(st.integers(0, count - 1))
        field, size = draw(st.sampled_from([(0, 2), (2, 2), (4, 4), (8, 4)]))
        values = [*EDGES, 3, 4, 5, 6, 8, 16, 32, 33, 256, 262, 274, 277, 317, 322, 338, 339]
        changed[at + field : at + field + size] = (draw(st.sampled_from(values)) % 256**size).to_bytes(
            size, "little" if order == "<" else "big"
        )
    return bytes(changed)


@st.composite
def encoded_images(draw: Callable[..., Any]) -> bytes:
    content = SAMPLES[draw(st.sampled_from(sorted(SAMPLES)))]
    if draw(st.integers(0, 9)) == 0:
        return content
    if draw(st.booleans()):
        if content.startswith(b"\x89PNG"):
            return mutate_png(draw, content)
        if content.startswith(b"\xff\xd8"):
            return mutate_jpeg(draw, content)
        if content[:4] in (b"II*\0", b"MM\0*"):
            return mutate_tiff(draw, content)
    return mutate_bytes(draw, content)


def read_image(content: bytes) -> None:
    """Pack the image; what packing keeps, training must decode to the same size."""
    prepared = images.prepare(content)
    assert 0 < prepared.width <= images.MAX_SIDE and 0 < prepared.height <= images.MAX_SIDE
    try:
        assert images.read_size(prepared.payload) == (prepared.width, prepared.height)
        assert decode(prepared.payload).shape == (prepared.height, prepared.width, 3)
    except ShardError as error:
        raise AssertionError(f"packed, but it cannot be decoded: {error}") from error


def make_parquet() -> bytes:
    table = pa.table({
        "image": [{"bytes": encoded(drawn_image(n, 12, 8)), "path": f"{n}.jpg"} for n in range(6)],
        "label": [0, 1, 2, 0, 1, 2],
    })  # fmt: skip
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2)
    return buffer.getvalue()


PARQUET = make_parquet()


@st.composite
def parquet_files(draw: Callable[..., Any]) -> bytes:
    content = mutate_bytes(draw, PARQUET)
    if draw(st.booleans()):  # the metadata at the end, with a right length
        (length,) = struct.unpack_from("<I", PARQUET, len(PARQUET) - 8)
        start = len(PARQUET) - 8 - length
        metadata = mutate_bytes(draw, PARQUET[start:-8])
        content = PARQUET[:start] + metadata + struct.pack("<I", len(metadata)) + b"PAR1"
    return content


def read_parquet(content: bytes) -> None:
    path = HERE / "x.parquet"
    path.write_bytes(content)
    for item in list_inputs(str(path)).items:
        try:
            item.location.read()
        except ShardError:
            continue


READERS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "image": (encoded_images, read_image),
    "parquet": (parquet_files, read_parquet),
}
