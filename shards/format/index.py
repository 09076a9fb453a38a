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

from shards.errors import ShardError
from shards.format import images
from shards.format.files import write_whole

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff")
LABEL_EXTENSION = "cls"
NO_LABEL = -1
_MAX_HEADER_BYTES = 1 << 20  # of a tar's member, with the long name and the attributes that it may have
_MAX_LABEL_BYTES = 1 << 10
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
    headers = _Headers(archive, name)
    try:
        tar = tarfile.open(fileobj=headers, mode="r:", encoding="utf-8")  # type: ignore[call-overload]  # noqa: SIM115
        end = 0
        while (member := tar.next()) is not None:
            # a size below zero, which a header can hold, leads back to where it was read before
            if member.size < 0 or tar.offset <= end:
                raise ShardError(f"{name} is damaged at byte {end}: a member of {member.size} bytes; fetch it again")
            if member.offset_data + member.size > size:
                raise ShardError(f"{name} is cut short at member {member.name!r}; fetch or pack it again")
            if member.issparse():
                raise ShardError(f"{name} holds {member.name!r} with holes (--sparse); pack it again without")
            if member.isreg():
                yield member
            end = tar.offset
            # it would remember all of them
            tar.members.clear()
            headers.renew()
        # tarfile ends in silence at a damaged header; a tar ends with zeros, or with the file
        archive.seek(tar.offset)
        if any(archive.read(tarfile.BLOCKSIZE)):
            raise ShardError(f"{name} is damaged at byte {tar.offset}: no header there; fetch or pack it again")
    except ShardError:
        raise
    # what a header says is taken for numbers, lengths and text without much ado
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise ShardError(f"{name} is not a complete tar file ({error}); fetch or pack it again") from error


class _Headers:
    """What ``tarfile`` reads of an archive: headers alone, and no more of them than a member can need."""

    def __init__(self, archive: BinaryIO, name: str) -> None:
        self._archive, self._name = archive, name
        self.seek, self.tell = archive.seek, archive.tell
        self.renew()

    def renew(self) -> None:
        """The next member comes."""
        self._left = _MAX_HEADER_BYTES

    def read(self, length: int) -> bytes:
        """The next bytes."""
        if not 0 <= length <= self._left:
            raise ShardError(f"{self._name} is damaged near byte {self.tell()}: its header is too long; fetch it again")
        self._left -= length
        return self._archive.read(length)


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
        if sample.image.length > images.MAX_BYTES:
            raise ShardError(f"{name}: {sample.image.name!r} has {sample.image.length} bytes, which no image has")
        payload = _read_part(archive, sample.image)
        label, stated = NO_LABEL, sample.label
        if stated is not None:
            label = read_label(archive, stated.offset, stated.length, f"{name}: {stated.name}")
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


def read_label(archive: BinaryIO, offset: int, length: int, name: str) -> int:
    """The label in a ``.cls`` component; raises as ``parse_label``."""
    archive.seek(offset)
    return parse_label(archive.read(min(length, _MAX_LABEL_BYTES)), name)


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
        with open(path, "rb") as file:
            count = _num_records(file, str(path), "copy the set again, or pack it again")
            if not count:
                return np.zeros(0, dtype=RECORD)
            return np.memmap(path, RECORD, "r", file.tell(), (count,))
    except FileNotFoundError as error:
        raise ShardError(f"index {path} is missing; copy the set again, or pack it again") from error
    except OSError as error:
        raise ShardError(f"index {path} is damaged; copy the set again, or pack it again") from error


def parse_index(content: bytes, name: str) -> np.ndarray:
    """The records [num_samples] in the bytes of an index file; raises as ``load_index``, calling the file ``name``."""
    file = io.BytesIO(content)
    count = _num_records(file, name, "upload the set again")
    return np.frombuffer(content, RECORD, count, file.tell())


def _num_records(file: BinaryIO, name: str, remedy: str) -> int:
    """How many records follow, once the header is read; the file has to end with them."""
    try:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else ((), False, None)
    except Exception as error:  # the header is a literal of Python's, in which nearly anything can be wrong
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


def dali_index(samples: tuple[Sample, ...]) -> bytes:
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
    # the names of a tar need not be text
    return ("\n".join(lines) + "\n").encode(errors="surrogateescape")


def _read_part(archive: BinaryIO, part: Component) -> bytes:
    archive.seek(part.offset)
    return archive.read(part.length)
