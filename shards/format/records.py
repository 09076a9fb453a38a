"""The index file of a shard: one record per image, with a checksum for each block of records.

    .npy header | records | _MAGIC | CRC-32 of each block of _BLOCK records | CRC-32 of the header, _MAGIC and these

``np.load`` reads the records and ignores the rest. Indexes written by earlier versions end after the records. A cached
copy of a shard has the same content without the header. Files are never memory-mapped, because truncating a mapped file
kills its readers with SIGBUS.
"""

from __future__ import annotations

import io
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from shards.errors import ShardError, explain_os_error, read_remedy
from shards.format import images
from shards.format.files import write_whole
from shards.format.tar_members import NO_LABEL

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

_BLOCK = 1024  # records per checksum, 26 kB: the unit that is read and verified
_MAGIC = b"\nBLOCKS\n"
_SUM = np.dtype("<u4")
_MAX_HEADER_BYTES = 4096  # of the .npy header; a header of these records has 256
_REMEDY = "copy the set again, or pack it again"

Read = Callable[[int, int], bytes]  # length, offset -> bytes, fewer at the end of the file; may raise OSError


class DamagedIndexError(ShardError):
    """A block of an index differs from its checksum or cannot be read; the other blocks may be sound."""


class Index:
    """The records of one shard, read a block at a time and verified when a block is read. Thread-safe.

    Args:
        read: reads the file; called again for a block that is no longer in memory.
        name: path or URL of the index, for messages.
        start: offset of the first record, in bytes.
        count: number of records.
        sums: checksums of the blocks, uint32 [num_blocks]; None for an index of an earlier version, which has none.
        remedy: for messages.
    """

    def __init__(
        self, read: Read, name: str, start: int, count: int, sums: np.ndarray | None, remedy: str = _REMEDY
    ) -> None:
        self._read, self._name, self._start, self._count = read, name, start, count
        self._sums, self._remedy = sums, remedy
        self._cache_key = object()

    @classmethod
    def open(cls, read: Read, num_bytes: int, name: str, remedy: str = _REMEDY) -> Index:
        """Open an index file of ``num_bytes``.

        Raises:
            ShardError: the file is truncated, damaged outside its records, or not an index.
            OSError: as raised by ``read``.
        """
        damaged = ShardError(f"index {name} is damaged; {remedy}")
        header = io.BytesIO(read(_MAX_HEADER_BYTES, 0))
        try:
            is_known = np.lib.format.read_magic(header) == (1, 0)
            shape, _, dtype = np.lib.format.read_array_header_1_0(header) if is_known else ((), False, None)
        except Exception as error:  # the header is a Python literal, which can fail in many ways
            raise damaged from error
        if dtype != RECORD or len(shape) != 1:
            raise ShardError(f"index {name} was written by another version; pack the set again")
        count, start = int(shape[0]), header.tell()
        rest = num_bytes - start - count * RECORD.itemsize
        if count < 0 or rest not in (0, _trailer_bytes(count)):
            raise damaged
        if not rest:
            return cls(read, name, start, count, None, remedy)
        return cls._open_sealed(read, name, start, count, header.getvalue()[:start], remedy)

    @classmethod
    def open_copy(cls, read: Read, name: str, start: int, count: int) -> Index:
        """Open the records and checksums that ``to_bytes`` returned, stored at offset ``start``; raises as ``open``."""
        return cls._open_sealed(read, name, start, count, b"", "the copy is fetched again")

    @classmethod
    def _open_sealed(cls, read: Read, name: str, start: int, count: int, header: bytes, remedy: str) -> Index:
        length = _trailer_bytes(count)
        trailer = read(length, start + count * RECORD.itemsize)
        sums = trailer[len(_MAGIC) : -_SUM.itemsize]
        if len(trailer) != length or trailer != _make_trailer(header, sums):
            raise ShardError(f"index {name} is damaged; {remedy}")
        return cls(read, name, start, count, np.frombuffer(sums, _SUM), remedy)

    def __len__(self) -> int:
        return self._count

    @property
    def has_checksums(self) -> bool:
        return self._sums is not None

    def record(self, sample: int) -> np.void:
        """Return the record of a sample.

        Raises:
            DamagedIndexError: its block is damaged or cannot be read.
            ShardError: the index was truncated since it was opened.
        """
        number, row = divmod(range(self._count)[sample], _BLOCK)
        block = _blocks.get((self._cache_key, number))
        if block is None:
            block = np.frombuffer(self._read_block(number), RECORD)
            _blocks.add((self._cache_key, number), block)
        # copied, because a view would keep the whole block in memory
        record: np.void = block[row : row + 1].copy()[0]
        return record

    def records(self) -> np.ndarray:
        """Return all records [num_samples]; raises as ``record``."""
        return np.frombuffer(b"".join(map(self._read_block, range(_num_blocks(self._count)))), RECORD)

    def to_bytes(self) -> bytes:
        """Return the records followed by their checksums. Damaged blocks keep the checksums that they do not match."""
        blocks = [self._read_raw(number) for number in range(_num_blocks(self._count))]
        sums = _checksums(blocks) if self._sums is None else self._sums.tobytes()
        return b"".join((*blocks, _make_trailer(b"", sums)))

    def _read_block(self, number: int) -> bytes:
        try:
            content = self._read_raw(number)
        except OSError as error:
            reason = f"index {self._name} cannot be read ({explain_os_error(error)})"
            raise DamagedIndexError(f"{reason}; {self._remedy}") from error
        if self._sums is not None and zlib.crc32(content) != int(self._sums[number]):
            first = number * _BLOCK
            span = f"records {first} to {min(first + _BLOCK, self._count) - 1} of index {self._name}"
            raise DamagedIndexError(f"{span} are damaged (wrong CRC-32); {self._remedy}")
        return content

    def _read_raw(self, number: int) -> bytes:
        first = number * _BLOCK
        length = min(_BLOCK, self._count - first) * RECORD.itemsize
        content = self._read(length, self._start + first * RECORD.itemsize)
        if len(content) != length:
            raise ShardError(f"index {self._name} was truncated while it was in use; {self._remedy}")
        return content


class _Blocks:
    """The most recently used blocks of all indexes, so that sets of any size need bounded memory."""

    _MAX_BLOCKS = 2500  # 64 MB

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[object, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[object, int]) -> np.ndarray | None:
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
            return block

    def add(self, key: tuple[object, int], block: np.ndarray) -> None:
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > self._MAX_BLOCKS:
                self._blocks.popitem(last=False)


_blocks = _Blocks()  # one for the process, because the bound is on the memory of the process


def sealed_bytes(count: int) -> int:
    """Return the length of ``Index.to_bytes`` for ``count`` records."""
    return count * RECORD.itemsize + _trailer_bytes(count)


def save_index(records: np.ndarray, path: Path) -> None:
    """Write records [num_samples] with their checksums to a ``.npy`` file atomically."""
    buffer = io.BytesIO()
    np.save(buffer, records.astype(RECORD), allow_pickle=False)
    content = buffer.getvalue()
    start = len(content) - len(records) * RECORD.itemsize
    header, body = content[:start], content[start:]
    blocks = [body[start : start + _BLOCK * RECORD.itemsize] for start in range(0, len(body), _BLOCK * RECORD.itemsize)]
    write_whole(path, content + _make_trailer(header, _checksums(blocks)))


def load_index(path: Path) -> np.ndarray:
    """Return the records [num_samples] of an index file.

    Raises:
        ShardError: missing, truncated, damaged, or not an index.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            read = partial(os.pread, file.fileno())
            return Index.open(read, os.fstat(file.fileno()).st_size, str(path)).records()
    except OSError as error:
        raise unreadable_index(path, error) from error


def unreadable_index(path: Path, error: OSError) -> ShardError:
    """Return the error for an index file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return ShardError(f"index {path} is missing; {_REMEDY}")
    return ShardError(f"index {path} cannot be read ({explain_os_error(error)}); {read_remedy(error, _REMEDY)}")


def open_bytes(content: bytes, name: str) -> Index:
    """Open an index file whose bytes are in memory; raises as ``Index.open``, naming ``name``."""

    def read(length: int, offset: int) -> bytes:
        return content[offset : offset + length]

    return Index.open(read, len(content), name, "upload the set again")


def find_record_fault(record: np.void, tar_bytes: int, num_classes: int) -> str | None:
    """Return the first impossible value of an image's record, as text, or None. An index may be damaged or hostile.

    Args:
        tar_bytes: length of the tar.
        num_classes: number of named classes; 0 if labels have no names.
    """
    offset, length, _, width, height, label, flags = record.item()
    if length > images.MAX_BYTES or offset + length > tar_bytes:
        return f"{length} bytes at offset {offset}"
    if flags not in (0, UNREADABLE):
        return f"unknown flags {flags:#x}"
    if (flags == UNREADABLE) != (width == 0 and height == 0) or (width == 0) != (height == 0):
        return f"{width}x{height} pixels with flags {flags:#x}"
    if label < NO_LABEL or (num_classes and label >= num_classes):
        return f"label {label}" + (f" of {num_classes} classes" if num_classes else "")
    return None


def _num_blocks(count: int) -> int:
    return -(-count // _BLOCK)


def _trailer_bytes(count: int) -> int:
    return len(_MAGIC) + (_num_blocks(count) + 1) * _SUM.itemsize


def _checksums(blocks: list[bytes]) -> bytes:
    return np.array([zlib.crc32(block) for block in blocks], _SUM).tobytes()


def _make_trailer(header: bytes, sums: bytes) -> bytes:
    trailer = _MAGIC + sums
    return trailer + np.array(zlib.crc32(header + trailer), _SUM).tobytes()
