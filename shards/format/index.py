"""Index of the images in a WebDataset tar, as records (``shards.format.records``) and in DALI's format.

A sample is a run of members with the same key, the part of the name before the first dot after the last slash. Its
image is the first component with one of ``IMAGE_EXTENSIONS``, its label the integer in ``.cls``. Samples without an
image are skipped.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import BinaryIO

import numpy as np

from shards.errors import ShardError
from shards.format import images
from shards.format.records import NO_LABEL, RECORD, UNREADABLE
from shards.format.records import load_index as load_index  # the whole index format is importable from here
from shards.format.records import parse_index as parse_index
from shards.format.records import save_index as save_index

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff")
LABEL_EXTENSION = "cls"
_MAX_HEADER_BYTES = 1 << 20  # of a tar member, with its long name and attributes
_MAX_LABEL_BYTES = 1 << 10


@dataclass(frozen=True)
class Component:
    """One member of a sample in a tar."""

    extension: str
    offset: int  # bytes from the start of the tar to the member's content
    length: int  # bytes
    name: str


@dataclass(frozen=True)
class Sample:
    """One sample of a tar, with its components in the tar's order."""

    key: str
    components: tuple[Component, ...]

    @property
    def image(self) -> Component | None:
        return next((part for part in self.components if part.extension.lower() in IMAGE_EXTENSIONS), None)

    @property
    def label(self) -> Component | None:
        return next((part for part in self.components if part.extension.lower() == LABEL_EXTENSION), None)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar that have an image, and their records [num_samples]."""

    records: np.ndarray
    samples: tuple[Sample, ...]


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension at the first dot after the last slash, as WebDataset and DALI do."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def read_samples(archive: BinaryIO, name: str) -> Iterator[Sample]:
    """Yield the samples of an uncompressed tar (USTAR, GNU or PAX) in order; hidden files are skipped.

    Raises:
        ShardError: not a tar, or truncated; names the tar.
    """
    members = ((*split_name(member.name), member) for member in read_members(archive, name))
    visible = (each for each in members if each[0] and not each[0].endswith("/") and each[1])
    for key, run in itertools.groupby(visible, key=lambda each: each[0]):
        yield Sample(key, tuple(Component(extension, m.offset_data, m.size, m.name) for _, extension, m in run))


def read_members(archive: BinaryIO, name: str) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an uncompressed tar.

    Raises:
        ShardError: not a tar, or truncated; names the tar.
    """
    size = archive.seek(0, io.SEEK_END)
    archive.seek(0)
    headers = _HeaderReader(archive, name)
    try:
        tar = tarfile.open(fileobj=headers, mode="r:", encoding="utf-8")  # type: ignore[call-overload]  # noqa: SIM115
        end = 0
        while (member := tar.next()) is not None:
            # a header can hold a negative size, which would lead back to an earlier member
            if member.size < 0 or tar.offset <= end:
                raise ShardError(f"{name} is damaged at byte {end}: a member of {member.size} bytes; fetch it again")
            if member.offset_data + member.size > size:
                raise ShardError(f"{name} is truncated at member {member.name!r}; fetch or pack it again")
            if member.issparse():
                raise ShardError(f"{name}: member {member.name!r} is sparse; pack it again without --sparse")
            if member.isreg():
                yield member
            end = tar.offset
            tar.members.clear()  # tarfile keeps every member
            headers.reset()
        # tarfile stops without an error at a damaged header; a complete tar ends with zeros or at the end of the file
        archive.seek(tar.offset)
        if any(archive.read(tarfile.BLOCKSIZE)):
            raise ShardError(f"{name} is damaged at byte {tar.offset}: expected a header; fetch or pack it again")
    except ShardError:
        raise
    # tarfile converts header fields to numbers, lengths and text with few checks
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ShardError(f"{name} is not a complete tar file ({error}); fetch or pack it again") from error


class _HeaderReader:
    """File interface for ``tarfile`` that reads headers only and bounds the header bytes per member."""

    def __init__(self, archive: BinaryIO, name: str) -> None:
        self._archive, self._name = archive, name
        self.seek, self.tell = archive.seek, archive.tell
        self.reset()

    def reset(self) -> None:
        """Start the byte budget of the next member."""
        self._left = _MAX_HEADER_BYTES

    def read(self, length: int) -> bytes:
        if not 0 <= length <= self._left:
            raise ShardError(f"{self._name} is damaged near byte {self.tell()}: its header is too long; fetch it again")
        self._left -= length
        return self._archive.read(length)


def build_index(archive: BinaryIO, name: str) -> ShardIndex:
    """Index a seekable tar, reading every image once for its checksum and size.

    Raises:
        ShardError: not a tar, or truncated; names the tar.
    """
    samples = tuple(sample for sample in read_samples(archive, name) if sample.image is not None)
    records = np.zeros(len(samples), dtype=RECORD)
    for row, sample in enumerate(samples):
        image, label_part = sample.image, sample.label
        assert image is not None
        if image.length > images.MAX_BYTES:
            raise ShardError(f"{name}: {image.name!r} has {image.length} bytes, more than {images.MAX_BYTES}")
        archive.seek(image.offset)
        payload = archive.read(image.length)
        label = NO_LABEL
        if label_part is not None:
            label = read_label(archive, label_part.offset, label_part.length, f"{name}: {label_part.name}")
        records[row] = make_record(image.offset, payload, label)
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


def read_label(archive: BinaryIO, offset: int, length: int, name: str) -> int:
    """Read the integer in a ``.cls`` component; ``NO_LABEL`` if it holds other text. Raises as ``check_label``."""
    archive.seek(offset)
    try:
        label = int(archive.read(min(length, _MAX_LABEL_BYTES)).decode("ascii").strip())
    except ValueError:
        return NO_LABEL
    return check_label(label, name)


def check_label(label: float | Decimal, name: str) -> int:
    """Return a label as the integer that the index stores; floats must be whole numbers.

    Raises:
        ShardError: the label is out of range or fractional; names it and ``name``, where it was found.
    """
    if not (NO_LABEL <= label < 2**31 and label == int(label)):
        raise ShardError(f"{name}: the label {label} is not a whole number from 0 to {2**31 - 1}, or -1 for no label")
    return int(label)


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
