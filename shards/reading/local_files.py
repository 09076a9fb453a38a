"""Reading local files at any offset, with a bound on the files that the process keeps open.

The bound is on all sets of the process together: the sets of a mixture, those of an evaluation, and cached copies.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from shards.errors import ShardError, explain_os_error, is_source_failure

_MAX_OPEN_FILES = 8192
_PAUSES = (0.1, 0.5, 2.0)  # seconds before each new attempt at a read that failed for reasons beyond the file

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def max_open_files() -> int:
    """Return how many tars and indexes, and as many cached copies, the process may keep open: half of its limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MAX_OPEN_FILES
    return max(4, min(limit // 4, _MAX_OPEN_FILES))


class _Descriptor:
    """A file descriptor, closed with its last reference."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _OpenFiles:
    """The open descriptors of the process's ``LocalFile`` objects, the most recently used last. Thread-safe."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[int, _Descriptor] = OrderedDict()
        # reentrant, because the garbage collector may delete a LocalFile at any moment
        self._lock = threading.RLock()

    def get(self, key: int) -> _Descriptor | None:
        with self._lock:
            descriptor = self._descriptors.get(key)
            if descriptor is not None:
                self._descriptors.move_to_end(key)
            return descriptor

    def add(self, key: int, descriptor: _Descriptor) -> None:
        with self._lock:
            self._descriptors[key] = descriptor
            self._shrink(max_open_files())

    def drop(self, key: int) -> None:
        with self._lock:
            self._descriptors.pop(key, None)

    def close_half(self) -> None:
        """Close half of the files, because another part of the process needs descriptors."""
        with self._lock:
            self._shrink(len(self._descriptors) // 2)

    def _shrink(self, count: int) -> None:
        while len(self._descriptors) > count:
            self._descriptors.popitem(last=False)


_open_files = _OpenFiles()  # one for the process, because the limit of open files is one of the process


def with_descriptors(function: Callable[[], Result]) -> Result:
    """Return the result of ``function``; if the process has too many open files, close some of its own and call again.

    Raises:
        OSError: as raised by ``function``.
    """
    try:
        return function()
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
    _open_files.close_half()
    return function()


class LocalFile:
    """A file on a local or mounted disk. It is opened when it is read and may be closed between reads. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, length: int, offset: int) -> bytes:
        """Return bytes of the file, fewer at its end.

        Raises:
            ShardError: the file cannot be opened, or the whole source fails (``is_source_failure``) for a few seconds.
            OSError: the bytes at this offset cannot be read (EIO), or the file does not exist (FileNotFoundError).
        """
        return self._retry(lambda descriptor: _pread(descriptor, length, offset))

    def num_bytes(self) -> int:
        """Return the length of the file; raises as ``read``."""
        return self._retry(lambda descriptor: os.fstat(descriptor).st_size)

    def _retry(self, function: Callable[[int], Result]) -> Result:
        pauses = iter(_PAUSES)
        while True:
            try:
                # a variable, because the descriptor must not be closed by another thread meanwhile
                descriptor = self._open()
                return function(descriptor.number)
            except OSError as error:
                if not is_source_failure(error):
                    raise
                reason, pause = explain_os_error(error), next(pauses, None)
                if pause is None:
                    raise ShardError(f"{self.path} cannot be read ({reason}); fix that and re-run to resume") from error
                logger.warning("%s cannot be read (%s); trying again", self.path, reason)
            _open_files.drop(id(self))  # a stale descriptor stays stale
            time.sleep(pause)

    def _open(self) -> _Descriptor:
        descriptor = _open_files.get(id(self))
        if descriptor is None:
            try:
                flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
                descriptor = _Descriptor(with_descriptors(lambda: os.open(self.path, flags)))
            except FileNotFoundError:
                raise
            except OSError as error:
                if is_source_failure(error):
                    raise
                reason = explain_os_error(error)
                raise ShardError(f"{self.path} cannot be opened ({reason}); restore it and re-run to resume") from error
            _open_files.add(id(self), descriptor)
        return descriptor

    def __del__(self) -> None:
        _open_files.drop(id(self))


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    content = os.pread(descriptor, length, offset)
    while len(content) < length and (more := os.pread(descriptor, length - len(content), offset + len(content))):
        content += more  # network file systems may return less than there is
    return content
