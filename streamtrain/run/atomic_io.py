"""Files that outlast a crash: summed while they are written, synced, and renamed into place as the last act."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

# Summed and written at a time. After each the interpreter must be won back from the thread that trains, so not too few.
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class FileSum:
    """What a file must hold to be whole."""

    num_bytes: int
    crc32: int


class SummedFile:
    """A new file whose bytes are summed as they are written; it is on the disk once ``finish`` returns.

    A context manager: without ``finish`` it is merely closed.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._sum = FileSum(0, 0)

    def write(self, values: bytes | memoryview) -> None:
        """Append ``values``.

        Raises:
            OSError: if they cannot be written, or only in part.
        """
        memory = memoryview(values).cast("B")
        for start in range(0, len(memory), _PIECE_BYTES):
            piece = memory[start : start + _PIECE_BYTES]
            self._sum = FileSum(self._sum.num_bytes + len(piece), zlib.crc32(piece, self._sum.crc32))
            while piece:
                piece = piece[os.write(self._file, piece) :]

    def finish(self) -> FileSum:
        """Wait until the disk has everything."""
        os.fsync(self._file)
        return self._sum

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def write_file(path: Path, content: bytes) -> FileSum:
    """Write a small file; it is on the disk, though not yet its name in the folder, when this returns."""
    with SummedFile(path) as file:
        file.write(content)
        return file.finish()


def replace_file(path: Path, content: bytes) -> None:
    """Give a small file other content: a crash leaves either the one or the other."""
    partial = path.with_name(f".{path.name}.partial")
    write_file(partial, content)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sum_of(path: Path) -> FileSum:
    """Read a whole file.

    Raises:
        OSError: if it cannot be read.
    """
    found, memory = FileSum(0, 0), memoryview(bytearray(_PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(memory):
            found = FileSum(found.num_bytes + count, zlib.crc32(memory[:count], found.crc32))
    return found
