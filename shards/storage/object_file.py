"""An object of a store as a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any


class ObjectFile(io.RawIOBase):
    """An object as an unbuffered, seekable binary file.

    Args:
        read: returns the bytes [begin, end) of the object; the file raises its errors.
        num_bytes: length of the object.
        piece_bytes: largest number of bytes to read at once.
    """

    def __init__(self, read: Callable[[int, int], bytes], num_bytes: int, piece_bytes: int) -> None:
        self._read, self._num_bytes, self._piece_bytes = read, num_bytes, piece_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + min(len(view), self._piece_bytes), self._num_bytes)
        if end <= self._position:
            return 0
        piece = self._read(self._position, end)
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
