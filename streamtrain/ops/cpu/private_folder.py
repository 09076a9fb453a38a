"""Private folders for compiled code: only this user can write to them, so that no other user's code is loaded.

Everything goes through descriptors of the folder, which stay valid if a parent folder is renamed or replaced.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotPrivateError(OSError):
    """Other users may write to a folder."""


@contextmanager
def open_private(folder: Path) -> Iterator[int]:
    """Open a folder during the ``with`` block and yield its descriptor; create it if it is missing.

    Raises:
        NotPrivateError: it belongs to another user or is a link.
        OSError: it cannot be created or opened.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        if folder.is_symlink():
            raise NotPrivateError(f"{folder} is a link") from None
        raise
    try:
        status = os.fstat(descriptor)
        if status.st_uid not in _trusted_owners():
            raise NotPrivateError(f"{folder} belongs to another user (uid {status.st_uid})")
        if status.st_mode & _WRITABLE_BY_OTHERS:
            if status.st_uid != os.geteuid():
                raise NotPrivateError(f"other users may write to {folder}")
            # a umask of 002 leaves a folder like this
            os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & ~_WRITABLE_BY_OTHERS)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: int, name: str) -> Iterator[None]:
    """Hold a lock file of an open folder during the ``with`` block; the system releases it when the process ends."""
    descriptor = os.open(
        name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode=0o600, dir_fd=folder
    )  # fmt: skip
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_trusted(folder: int, name: str) -> int | None:
    """Open a file of an open folder; None if it is missing, or others own it or may write to it."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    status = os.fstat(descriptor)
    is_private = status.st_uid in _trusted_owners() and not status.st_mode & _WRITABLE_BY_OTHERS
    if stat.S_ISREG(status.st_mode) and is_private:
        return descriptor
    os.close(descriptor)
    return None


def _trusted_owners() -> tuple[int, int]:
    return os.geteuid(), 0


def store(folder: int, name: str, source: Path) -> None:
    """Copy ``source`` into an open folder as ``name``, in one rename."""
    temporary = f".{name}.{secrets.token_hex(8)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode=0o600, dir_fd=folder)
    try:
        with open(source, "rb") as read, open(descriptor, "wb") as write:
            shutil.copyfileobj(read, write)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def open_or_make(folder: int, name: str, make: Callable[[Path], None]) -> int:
    """Open a trusted file of an open folder and return its descriptor.

    If there is none, ``make(path)`` writes it to a temporary folder; of several processes only the first one does.
    """
    if (found := open_trusted(folder, name)) is not None:
        return found
    with locked(folder, f"{name}.lock"):
        if (found := open_trusted(folder, name)) is None:
            with tempfile.TemporaryDirectory() as temporary:
                make(Path(temporary) / name)
                store(folder, name, Path(temporary) / name)
            found = open_trusted(folder, name)
    if found is None:
        raise OSError(f"{name} cannot be opened after it was written")
    return found
