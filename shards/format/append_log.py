"""An append-only log file. While the disk is full or fails, records are delayed in memory, not torn."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shards.format.files import open_to_append

MAX_PENDING_BYTES = 16 << 20  # kept in memory while the file cannot be written
RETRY_SECONDS = 1.0
_WARNING_SECONDS = 60.0  # between two warnings of one file
_BLOCK_BYTES = 1 << 16
logger = logging.getLogger(__name__)


class AppendLog:
    """Appends records to a file. Records that cannot be written stay in memory, and later calls write them.

    A partly written record is removed before the next one is written. In a shared file it is ended by a line break
    instead, and the record is written again in full.

    Args:
        path: the file, in an existing folder; a link raises OSError.
        is_shared: whether other processes append to the file, which then consists of lines.
        prepare: called before the file is first opened; an OSError delays the records too.

    Attributes:
        num_lost: records dropped because more than ``MAX_PENDING_BYTES`` were in memory.
    """

    def __init__(self, path: Path, *, is_shared: bool = False, prepare: Callable[[], object] | None = None) -> None:
        self.path, self.num_lost = path, 0
        self._is_shared, self._prepare = is_shared, prepare
        self._file: int | None = None
        self._end: int | None = None  # of the last whole record, unless the file is shared
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._is_failing = False
        self._next_attempt = self._next_warning = 0.0

    def append(self, record: bytes) -> None:
        """Write a record in one call, if possible; never raises OSError."""
        self._pending.append(record)
        self._pending_bytes += len(record)
        while self._pending_bytes > MAX_PENDING_BYTES and len(self._pending) > 1:
            self._pending_bytes -= len(self._pending.popleft())
            self.num_lost += 1
        if not self._is_failing or time.monotonic() >= self._next_attempt:
            self.flush()

    def retry(self) -> None:
        """Write the records that are still in memory, unless the last attempt failed a moment ago."""
        if self._pending and time.monotonic() >= self._next_attempt:
            self.flush()

    def flush(self) -> None:
        """Open the file if it is not open, and write the records that are still in memory."""
        began = time.monotonic()
        try:
            self._write()
        except OSError as error:
            self._close_file()
            # a disk that takes long to fail must not slow down the caller
            self._next_attempt = time.monotonic() + max(RETRY_SECONDS, 20 * (time.monotonic() - began))
            if not self._is_failing and began >= self._next_warning:
                self._next_warning = began + _WARNING_SECONDS
                reason = error.strerror or str(error)
                logger.warning(
                    "%s cannot be written (%s); its records are kept in memory (up to %d MB) until the disk recovers",
                    self.path, reason, MAX_PENDING_BYTES >> 20,
                )  # fmt: skip
            self._is_failing = True
            return
        if self._is_failing:
            lost = f", but {self.num_lost} records did not fit in memory and are lost" if self.num_lost else ""
            logger.info("%s can be written again%s", self.path, lost)
        self._is_failing = False
        if self._is_shared:
            self._close_file()

    def close(self) -> None:
        """Write the records that are still in memory, and close the file; a record that cannot be written is lost."""
        if self._pending:
            self.flush()
        if self._pending:
            logger.warning("%d records of %s could not be written and are lost", len(self._pending), self.path)
            self.num_lost += len(self._pending)
            self._pending.clear()
            self._pending_bytes = 0
        self._close_file()

    def _write(self) -> None:
        if self._file is None:
            self._open()
        assert self._file is not None
        try:
            while self._pending:
                record = self._pending[0]
                rest = memoryview(record)
                if self._is_shared and _is_torn(self._file):
                    rest = memoryview(b"\n" + record)
                while rest:
                    written = os.write(self._file, rest)
                    if not written:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    rest = rest[written:]
                if self._end is not None:
                    self._end += len(record)
                self._pending.popleft()
                self._pending_bytes -= len(record)
        except OSError:
            if self._end is not None:
                # so that readers find only whole records; if this fails, it is repeated before the next record
                with suppress(OSError):
                    os.ftruncate(self._file, self._end)
            raise

    def _open(self) -> None:
        if self._prepare is not None:
            self._prepare()
            self._prepare = None
        self._file = open_to_append(self.path)
        if self._is_shared:
            return
        size = os.fstat(self._file).st_size
        if self._end is None:
            self._end = _end_of_lines(self._file, size)
        self._end = min(self._end, size)
        if size > self._end:
            os.ftruncate(self._file, self._end)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            # some file systems report failed writes only here; the records are no longer in memory
            with suppress(OSError):
                os.close(file)


def _is_torn(file: int) -> bool:
    """Return whether the file ends within a line."""
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def _end_of_lines(file: int, size: int) -> int:
    """Return the offset that follows the last line break."""
    stop = size
    while stop > 0:
        start = max(0, stop - _BLOCK_BYTES)
        found = os.pread(file, stop - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0
