"""Files with a checksum of their content, synced to disk before they count."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shards.format.files import create_file, write_all

# bytes per write; not too small, because after each write this thread waits for the GIL
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class FileChecksum:
    """Size and CRC-32 of a file."""

    num_bytes: int
    crc32: int


class ChecksummedFile:
    """A new file with a checksum of the written bytes, as a context manager; on disk once ``finish`` returns."""

    def __init__(self, path: Path) -> None:
        self._file = create_file(path)
        self._checksum = FileChecksum(0, 0)

    def write(self, values: bytes | memoryview) -> None:
        """Append ``values``; raises OSError."""
        memory = memoryview(values).cast("B")
        for start in range(0, len(memory), _PIECE_BYTES):
            piece = memory[start : start + _PIECE_BYTES]
            crc32 = zlib.crc32(piece, self._checksum.crc32)
            self._checksum = FileChecksum(self._checksum.num_bytes + len(piece), crc32)
            write_all(self._file, piece)

    def finish(self) -> FileChecksum:
        """Sync the file to disk and return its checksum."""
        os.fsync(self._file)
        return self._checksum

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def write_file(path: Path, content: bytes) -> FileChecksum:
    """Write a small file and sync its contents, but not its name in the folder, to disk."""
    with ChecksummedFile(path) as file:
        file.write(content)
        return file.finish()


def compute_checksum(path: Path) -> FileChecksum:
    """Read a file and return its checksum; raises OSError."""
    checksum, memory = FileChecksum(0, 0), memoryview(bytearray(_PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(memory):
            checksum = FileChecksum(checksum.num_bytes + count, zlib.crc32(memory[:count], checksum.crc32))
    return checksum
