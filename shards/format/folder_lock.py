"""A lock on a folder, for one writing process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

# file systems without locks: NFS without lockd, Lustre without -o flock, some FUSE file systems
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# NFS locks only files that are open for writing, which a folder cannot be
_UNSUPPORTED_FOLDER = (*_UNSUPPORTED, errno.EBADF)


class FolderInUse(Exception):
    """Another process holds the lock of a folder."""


@contextmanager
def lock_folder(folder: Path, name: str) -> Iterator[int]:
    """Lock a folder during the ``with`` block, and yield a descriptor of it; the end of the process releases the lock.

    Both the folder itself and its file ``name`` are locked: the file can be deleted by a cleaner of hidden files, and
    some file systems lock only files. Where neither can be locked, a warning is logged.

    Raises:
        FolderInUse: another process holds the lock.
        OSError: the folder or the file cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    file = None
    try:
        is_locked = _lock(descriptor, _UNSUPPORTED_FOLDER)
        file, is_file_locked = _lock_file(folder / name)
        if not (is_locked or is_file_locked):
            logger.warning(f"{folder} is on a file system without file locks; let only one process write to it")
        yield descriptor
    finally:
        for each in (descriptor, file):
            if each is not None:
                os.close(each)


def _lock_file(path: Path) -> tuple[int, bool]:
    """Open or create a file and lock it; return its descriptor and whether its file system can lock it."""
    while True:
        if path.is_symlink():
            path.unlink()  # a link is never followed
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not _lock(descriptor, _UNSUPPORTED):
                return descriptor, False
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    return descriptor, True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the process that held the lock has deleted the file


def _lock(descriptor: int, unsupported: tuple[int, ...]) -> bool:
    """Lock an open file or folder; return False if its file system cannot."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES):
            raise FolderInUse from None
        if error.errno not in unsupported:
            raise
        return False
    return True
