"""An open tar, wherever it lies: bytes by offset."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

from shards.storage.store import Store


class Tar(Protocol):
    """Where the images of a shard are read from. Safe to share between threads."""

    def read(self, length: int, offset: int) -> bytes:
        """Bytes of the tar, fewer where it ends; OSError where it cannot be read."""


class LocalTar:
    """A tar on a local or mounted disk; opened when it is first read, closed when its last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._lock = threading.Lock()

    def read(self, length: int, offset: int) -> bytes:
        """As ``Tar.read``."""
        with self._lock:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return os.pread(self._file, length, offset)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


class RemoteTar:
    """A tar in a store, read in ranges without a disk."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.store.url_of(self.name)

    def read(self, length: int, offset: int) -> bytes:
        """As ``Tar.read``; retries as the store does.

        Raises:
            ShardError: the tar is gone or cannot be reached. That is no fault of an image, so a reader must not go on
                without it as it does without an image that is damaged.
        """
        return self.store.read(self.name, offset, offset + length)


def is_url(location: str) -> bool:
    """Whether a location is read through a store rather than as a local path."""
    return "://" in location or location.startswith("pipe:")
