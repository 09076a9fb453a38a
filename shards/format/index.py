"""Index of the images in a WebDataset tar, as a numpy array and in DALI's format.

Members form samples as described in ``tar_members``. Samples without an image are skipped.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards.errors import ShardError
from shards.format import images
from shards.format.files import write_whole
from shards.format.tally import Tally
from shards.format.tar_members import Sample, read_samples

UNREADABLE = 1  # flag: the image's header could not be read; width and height are 0

# One record per sample. Offset and length are the span of the image in the tar; width and height are in pixels with the
# EXIF orientation applied.
RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("label", "<i4"),
        ("flags", "<u2"),
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar that have an image, and their records [num_samples]."""

    records: np.ndarray
    samples: tuple[Sample, ...]


def build_index(archive: BinaryIO, name: str, tally: Tally | None = None) -> ShardIndex:
    """Index a seekable tar, reading every image once for its checksum and size; raises as ``read_samples``.

    Args:
        tally: receives the counts of members that are passed over.

    Raises:
        ShardError: not a tar, or truncated; names the tar.
    """
    samples = read_samples(archive, name, tally)
    records = np.zeros(len(samples), dtype=RECORD)
    for row, sample in enumerate(samples):
        image = sample.image
        if image.length > images.MAX_BYTES:
            raise ShardError(f"{name}: {image.name!r} has {image.length} bytes, more than {images.MAX_BYTES}")
        archive.seek(image.offset)
        records[row] = make_record(image.offset, archive.read(image.length), sample.label)
    return ShardIndex(records, samples)


def make_record(offset: int, payload: bytes, label: int) -> np.ndarray:
    """Return the record of an image at an offset of a tar, flagged ``UNREADABLE`` if its header cannot be read."""
    try:
        width, height = images.read_size(payload)
        flags = 0
    except ShardError:
        width, height, flags = 0, 0, UNREADABLE
    if max(width, height) > images.MAX_SIDE:
        width, height, flags = 0, 0, UNREADABLE
    return np.array((offset, len(payload), zlib.crc32(payload), width, height, label, flags), dtype=RECORD)


def save_index(records: np.ndarray, path: Path) -> None:
    """Write records [num_samples] to a ``.npy`` file atomically."""
    buffer = io.BytesIO()
    np.save(buffer, records.astype(RECORD), allow_pickle=False)
    write_whole(path, buffer.getvalue())


def load_index(path: Path) -> np.ndarray:
    """Return the records [num_samples] of a shard, memory-mapped.

    Raises:
        ShardError: missing, truncated, or not an index.
    """
    try:
        with open(path, "rb") as file:
            count = _read_header(file, str(path), "copy the set again, or pack it again")
            if not count:
                return np.zeros(0, dtype=RECORD)
            return np.memmap(path, RECORD, "r", file.tell(), (count,))
    except FileNotFoundError as error:
        raise ShardError(f"index {path} is missing; copy the set again, or pack it again") from error
    except OSError as error:
        raise ShardError(f"index {path} is damaged; copy the set again, or pack it again") from error


def parse_index(content: bytes, name: str) -> np.ndarray:
    """Return the records [num_samples] in the bytes of an index file; raises as ``load_index``, naming ``name``."""
    file = io.BytesIO(content)
    count = _read_header(file, name, "upload the set again")
    return np.frombuffer(content, RECORD, count, file.tell())


def _read_header(file: BinaryIO, name: str, remedy: str) -> int:
    """Read the ``.npy`` header and return the number of records; they must end at the end of the file."""
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), False, None)
    except Exception as error:  # the header is a Python literal, which can fail in many ways
        raise ShardError(f"index {name} is damaged; {remedy}") from error
    if dtype != RECORD or len(shape) != 1:
        raise ShardError(f"index {name} was written by another version; pack the set again")
    start = file.tell()
    rest = file.seek(0, io.SEEK_END) - start
    file.seek(start)
    count = int(shape[0])
    if count * RECORD.itemsize != rest:
        raise ShardError(f"index {name} is damaged; {remedy}")
    return count


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
