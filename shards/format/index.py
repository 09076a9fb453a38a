"""Index of the images in a WebDataset tar, as records (``shards.format.records``) and in DALI's format.

Members form samples as described in ``tar_members``. Samples without an image are skipped.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from shards.errors import ShardError
from shards.format import images
from shards.format.pixels import RGB, PixelFormat
from shards.format.records import RECORD, UNREADABLE
from shards.format.records import load_index as load_index  # scripts of earlier versions import these two from here
from shards.format.records import save_index as save_index
from shards.format.tally import Tally
from shards.format.tar_members import MAP_EXTENSIONS, NO_LABEL, Sample, read_samples


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar that have an image, and their records [num_samples]."""

    records: np.ndarray
    samples: tuple[Sample, ...]
    # records [num_samples] of the maps of each kind that occurs, of length 0 where an image has none
    maps: dict[str, np.ndarray]


def build_index(archive: BinaryIO, name: str, tally: Tally | None = None, pixels: PixelFormat = RGB) -> ShardIndex:
    """Index a seekable tar, reading every image once for its checksum and size; raises as ``read_samples``.

    Args:
        tally: receives the counts of members that are passed over.
        pixels: of the set.

    Raises:
        ShardError: not a tar, or truncated; names the tar.
    """
    samples = read_samples(archive, name, tally, pixels)
    records = np.zeros(len(samples), dtype=RECORD)
    for row, sample in enumerate(samples):
        image = sample.image
        if image.length > images.MAX_BYTES:
            raise ShardError(f"{name}: {image.name!r} has {image.length} bytes, more than {images.MAX_BYTES}")
        archive.seek(image.offset)
        records[row] = make_record(image.offset, archive.read(image.length), sample.label, pixels)
    return ShardIndex(records, samples, _index_maps(archive, name, samples))


def _index_maps(archive: BinaryIO, name: str, samples: tuple[Sample, ...]) -> dict[str, np.ndarray]:
    maps: dict[str, np.ndarray] = {}
    for kind in MAP_EXTENSIONS:
        found = [(row, part) for row, sample in enumerate(samples) if (part := sample.map_of(kind)) is not None]
        for row, part in found:
            if part.length > images.MAX_BYTES:
                raise ShardError(f"{name}: {part.name!r} has {part.length} bytes, more than {images.MAX_BYTES}")
            archive.seek(part.offset)
            records = maps.setdefault(kind, np.zeros(len(samples), dtype=RECORD))
            records[row] = make_map_record(part.offset, archive.read(part.length))
    return maps


def make_map_record(offset: int, payload: bytes) -> np.ndarray:
    """Return the record of a map at an offset of a tar; its size is not stored."""
    return np.array((offset, len(payload), zlib.crc32(payload), 0, 0, NO_LABEL, 0), dtype=RECORD)


def make_record(offset: int, payload: bytes, label: int, pixels: PixelFormat = RGB) -> np.ndarray:
    """Return the record of an image at an offset of a tar, flagged ``UNREADABLE`` if its header cannot be read."""
    try:
        width, height = images.read_size(payload, pixels)
        flags = 0
    except ShardError:
        width, height, flags = 0, 0, UNREADABLE
    if max(width, height) > images.MAX_SIDE:
        width, height, flags = 0, 0, UNREADABLE
    return np.array((offset, len(payload), zlib.crc32(payload), width, height, label, flags), dtype=RECORD)


def make_dali_index(samples: tuple[Sample, ...]) -> bytes:
    """Return DALI's index, version 1.2 with four fields per component: extension, offset, length, name.

    Raises:
        ShardError: a name contains a space, which breaks the columns that DALI's reader expects.
    """
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        spaced = next((part.name for part in sample.components if len(part.name.split()) != 1), None)
        if spaced is not None:
            raise ShardError(f"DALI's index cannot hold names with spaces, such as {spaced!r}")
        lines.append(" ".join(f"{c.extension} {c.offset} {c.length} {c.name}" for c in sample.components))
    # member names may not be valid text
    return ("\n".join(lines) + "\n").encode(errors="surrogateescape")
