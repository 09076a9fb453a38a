"""Where each image lies in a WebDataset tar: our index (a numpy array) and DALI's, built from any tar.

A sample is a run of members that share a key, the part of the name before the first dot of its last
component; its image is the first component with one of ``IMAGE_EXTENSIONS``, its label an integer in
``.cls``. Samples without an image are passed over.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

import numpy as np

from shards import images
from shards.errors import ShardError
from shards.files import write_whole

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff")
LABEL_EXTENSION = "cls"
NO_LABEL = -1
UNREADABLE = 1  # flag: the image's header could not be read; its width and height are 0

# One record a sample. Offset and length are the image's bytes in the tar; width and height are pixels as
# displayed.
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
class Component:
    """One member of a sample in a tar."""

    extension: str
    offset: int  # of the member's bytes, from the start of the tar
    length: int  # bytes
    name: str


@dataclass(frozen=True)
class Sample:
    """One sample of a tar, in the tar's order of members."""

    key: str
    components: tuple[Component, ...]

    @property
    def image(self) -> Component | None:
        """The component that holds the image, if there is one."""
        return next((part for part in self.components if part.extension.lower() in IMAGE_EXTENSIONS), None)

    @property
    def label(self) -> Component | None:
        """The component that holds the label, if there is one."""
        return next((part for part in self.components if part.extension.lower() == LABEL_EXTENSION), None)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar that have an image: their records [num_samples] and their components."""

    records: np.ndarray
    samples: tuple[Sample, ...]


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extension, cut at the first dot after the last slash, as in WebDataset and DALI."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def read_samples(archive: BinaryIO, name: str) -> Iterator[Sample]:
    """The samples of a tar (USTAR, GNU or PAX, uncompressed), in order; hidden files and members without a key are not.

    Raises:
        ShardError: not a tar, or cut short; names the tar.
    """
    key: str | None = None
    components: list[Component] = []
    for member in read_members(archive, name):
        member_key, extension = split_name(member.name)
        if not extension or not member_key or member_key.endswith("/"):
            continue
        if member_key != key:
            if key is not None:
                yield Sample(key, tuple(components))
            key, components = member_key, []
        components.append(Component(extension, member.offset_data, member.size, member.name))
    if key is not None:
        yield Sample(key, tuple(components))


def read_members(archive: BinaryIO, name: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of an uncompressed tar.

    Raises:
        ShardError: not a tar, or cut short; names the tar.
    """
    size = archive.seek(0, io.SEEK_END)
    archive.seek(0)
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise ShardError(f"{name} is cut short at member {member.name}; fetch or pack it again")
                if member.isreg():
                    yield member
            # tarfile ends in silence at a damaged header; a tar ends with zeros, or with the file
            archive.seek(tar.offset)
            if any(archive.read(tarfile.BLOCKSIZE)):
                raise ShardError(f"{name} is damaged at byte {tar.offset}: no header there; fetch or pack it again")
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{name} is not a complete tar file ({error}); fetch or pack it again") from error


def build(archive: BinaryIO, name: str) -> ShardIndex:
    """Index a tar, reading every image once for its checksum and size.

    Args:
        archive: the tar, open for reading and seekable.
        name: what errors call it.

    Raises:
        ShardError: not a tar, or cut short; names the tar.
    """
    samples = tuple(sample for sample in read_samples(archive, name) if sample.image is not None)
    records = np.zeros(len(samples), dtype=RECORD)
    for row, sample in enumerate(samples):
        assert sample.image is not None
        payload = _read_part(archive, sample.image)
        stated = sample.label
        label = NO_LABEL if stated is None else parse_label(_read_part(archive, stated), f"{name}: {stated.name}")
        records[row] = make_record(sample.image.offset, payload, label)
    return ShardIndex(records, samples)


def make_record(offset: int, payload: bytes, label: int) -> np.ndarray:
    """The record of an image that lies at an offset of a tar; flagged where its header cannot be read."""
    try:
        width, height = images.read_size(payload)
        flags = 0
    except ShardError:
        width, height, flags = 0, 0, UNREADABLE
    if max(width, height) > images.MAX_SIDE:
        width, height, flags = 0, 0, UNREADABLE
    return np.array((offset, len(payload), zlib.crc32(payload), width, height, label, flags), dtype=RECORD)


def parse_label(content: bytes, name: str) -> int:
    """The integer in a ``.cls`` component; ``NO_LABEL`` where it holds text, which is no integer. Raises as below."""
    try:
        label = int(content.decode("ascii").strip())
    except ValueError:
        return NO_LABEL
    return checked_label(label, name)


def checked_label(label: float | Decimal, name: str) -> int:
    """A label as an index can hold it; whole numbers in floating point are taken as integers.

    Raises:
        ShardError: another number; names it and the place ``name`` that it comes from.
    """
    if not (NO_LABEL <= label < 2**31 and label == int(label)):
        raise ShardError(f"{name}: the label {label} is no whole number from 0 to {2**31 - 1}, nor -1 for none")
    return int(label)


def save_index(records: np.ndarray, path: Path) -> None:
    """Write records [num_samples] as a ``.npy`` file, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, records.astype(RECORD), allow_pickle=False)
    write_whole(path, buffer.getvalue())


def load_index(path: Path) -> np.ndarray:
    """The records [num_samples] of a shard, mapped into memory rather than read.

    Raises:
        ShardError: missing, cut short, or not an index.
    """
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ShardError(f"index {path} is missing; copy the set again, or pack it again") from error
    except (ValueError, OSError, EOFError) as error:
        raise ShardError(f"index {path} is damaged; copy the set again, or pack it again") from error
    return _checked(records, str(path))


def parse_index(content: bytes, name: str) -> np.ndarray:
    """The records [num_samples] in the bytes of an index file; raises as ``load_index``, calling the file ``name``."""
    try:
        records = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ShardError(f"index {name} is damaged; upload the set again") from error
    return _checked(records, name)


def _checked(records: np.ndarray, name: str) -> np.ndarray:
    if records.dtype != RECORD or records.ndim != 1:
        raise ShardError(f"index {name} was written by another version; pack the set again")
    return records


def dali_index(samples: tuple[Sample, ...]) -> str:
    """The text of DALI's index, version 1.2 with four fields a component: extension, offset, length, name.

    Raises:
        ShardError: a name with a space, on which DALI's reader would lose its place.
    """
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        spaced = next((part.name for part in sample.components if len(part.name.split()) != 1), None)
        if spaced is not None:
            raise ShardError(f"DALI's index cannot hold names with spaces, such as {spaced!r}")
        lines.append(" ".join(f"{c.extension} {c.offset} {c.length} {c.name}" for c in sample.components))
    return "\n".join(lines) + "\n"


def _read_part(archive: BinaryIO, part: Component) -> bytes:
    archive.seek(part.offset)
    return archive.read(part.length)
