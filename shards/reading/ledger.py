"""Cache folder shared by the processes of a machine: its files, their next uses, and eviction.

The folder holds the only record of its state, so a killed process cannot leave an inconsistent second one:

KEY.shard           a complete file; each reader holds a shared lock on it
KEY.BYTES.partial   a reservation of BYTES for a file, created before the download; the downloading process holds an
                    exclusive lock on it
NAME.user           the files that a process needs next, and when; the process holds an exclusive lock on it
lock                held while files are evicted, reserved or renamed

The kernel releases the locks of a dead process, so its claims need no cleanup: its reservation is taken over by the
next process that fetches the same file or needs room. Files with other names are ignored and not counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import filelock

from shards.errors import ShardError

NEVER = 2**62  # next use of a file that no process needs
USE_BYTES = 64  # of a line in a .user file: 32 hex digits, a space, a distance and a newline
_FILE = re.compile(r"([0-9a-f]{32})\.(?:shard|(\d+)\.partial)")
_USER = re.compile(r"[0-9a-f]{32}\.user")
_POLL_SECONDS = 0.005


class Refusal(Enum):
    """Why no space was reserved."""

    PRESENT = "the file is complete"
    BUSY = "another process or thread is fetching the file"
    FULL = "all other files are in use, or needed sooner"


@dataclass(frozen=True)
class _File:
    path: Path
    key: str
    num_bytes: int  # reserved size of a partial file, actual size of a complete one
    modified: float


@dataclass(frozen=True)
class _Content:
    """A snapshot of the folder."""

    files: tuple[_File, ...]
    users: tuple[Path, ...]  # .user files of the other living processes
    user_bytes: int  # of all .user files, this process's included

    @property
    def num_bytes(self) -> int:
        """Total size of the files in bytes, reservations counted in full."""
        return sum(file.num_bytes for file in self.files) + self.user_bytes


class Reservation:
    """Space reserved for a file, until it is committed, released or discarded.

    Attributes:
        path: file to write to; holds the bytes of an earlier attempt.
    """

    def __init__(self, path: Path, descriptor: int, lock: filelock.BaseFileLock) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._lock = lock

    def commit(self) -> None:
        """Rename the file, which is now complete."""
        with self._lock.acquire(poll_interval=_POLL_SECONDS):
            self.release()  # before the rename, so that readers can lock the complete file
            os.replace(self.path, self.path.with_name(f"{self.path.name.partition('.')[0]}.shard"))

    def release(self) -> None:
        """Release the lock and keep the bytes, so that another process can continue the download."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.release()


class Ledger:
    """One process's view of the folder. Safe to share between threads.

    Args:
        folder: folder of the cache; created if it does not exist.
        limit_bytes: maximum total size of the files, downloads counted in full.

    Raises:
        ShardError: the folder cannot be created or written to.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._lock = filelock.FileLock(folder / "lock")
        self._user = folder / f"{uuid.uuid4().hex}.user"
        self._uses: dict[str, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._descriptor: int | None = os.open(self._user, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
                # an earlier run may have had a higher limit
                self._make_room(self._scan(), 0, next_use=-1)
        except OSError as error:
            raise ShardError(f"the cache folder {folder} cannot be used ({error.strerror}); give another") from error

    def open(self, key: str, num_bytes: int) -> int | None:
        """Return a descriptor of a complete file, which stays in the cache until it is closed; None if there is none.

        Args:
            num_bytes: required length; a file of another length is deleted.
        """
        try:
            descriptor = os.open(self._complete_path(key), os.O_RDONLY)
        except FileNotFoundError:
            return None
        status = os.fstat(descriptor)
        if status.st_size == num_bytes:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except BlockingIOError:
                pass  # the file is being evicted or committed
        os.close(descriptor)
        if status.st_size != num_bytes:
            self.discard(key)
        return None

    def reserve(self, key: str, num_bytes: int) -> Reservation | Refusal:
        """Reserve space for a file, evicting files that are needed later if necessary.

        Evicts nothing if that would not free enough space.
        """
        partial = self.folder / f"{key}.{num_bytes}.partial"
        assert _FILE.fullmatch(partial.name), partial.name
        with self._locked():
            if self._complete_path(key).exists():
                return Refusal.PRESENT
            if partial.exists():
                descriptor = _lock_exclusively(partial)
                if descriptor is None:
                    return Refusal.BUSY
            else:
                content = self._scan()
                if not self._make_room(content, num_bytes, self._next_uses(content).get(key, NEVER)):
                    return Refusal.FULL
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            return Reservation(partial, descriptor, self._lock)

    def publish(self, uses: Mapping[str, int]) -> None:
        """Publish to the other processes when this one needs each file next.

        Args:
            uses: distance to the next use by key, soonest first, in a unit that all processes share; 0 is now. Entries
                that do not fit within the limit are omitted.
        """
        with self._locked():
            if self._descriptor is None:
                return  # closed by another thread
            content = self._scan()
            room = self.limit_bytes - content.num_bytes + self._user.stat().st_size
            lines, length = [], 0
            for key, distance in uses.items():
                line = f"{key} {distance}\n".encode()
                length += len(line)
                if length > room:
                    break
                lines.append(line)
            text = b"".join(lines)
            os.pwrite(self._descriptor, text, 0)
            os.ftruncate(self._descriptor, len(text))
            self._uses = dict(uses)

    def present(self) -> set[str]:
        """Return the keys of the complete files."""
        return {name.removesuffix(".shard") for name in os.listdir(self.folder) if name.endswith(".shard")}

    def discard(self, key: str) -> None:
        """Delete a complete file, unless it is open."""
        with self._locked():
            descriptor = _lock_exclusively(self._complete_path(key))
            if descriptor is not None:
                self._complete_path(key).unlink()
                os.close(descriptor)

    def close(self) -> None:
        """Withdraw the published uses of this process."""
        with self._locked():
            self._user.unlink(missing_ok=True)
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _locked(self) -> filelock.AcquireReturnProxy:
        return self._lock.acquire(poll_interval=_POLL_SECONDS)

    def _complete_path(self, key: str) -> Path:
        return self.folder / f"{key}.shard"

    def _scan(self) -> _Content:
        """Scan the folder, and delete the .user files of dead processes."""
        files, users, user_bytes = [], [], 0
        for entry in os.scandir(self.folder):
            is_user = _USER.fullmatch(entry.name)
            match = _FILE.fullmatch(entry.name)
            if not (is_user or match) or not entry.is_file(follow_symlinks=False):
                continue
            path = Path(entry.path)
            if is_user and path != self._user:
                descriptor = _lock_exclusively(path)
                if descriptor is not None:
                    path.unlink()
                    os.close(descriptor)
                    continue
                users.append(path)
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # discarded by another process
            if match:
                num_bytes = int(match[2]) if match[2] else status.st_size
                files.append(_File(path, match[1], num_bytes, status.st_mtime))
            else:
                user_bytes += status.st_size
        return _Content(tuple(files), tuple(users), user_bytes)

    def _next_uses(self, content: _Content) -> dict[str, int]:
        """Return the distance to the next use of each file by any living process."""
        uses = dict(self._uses)
        for path in content.users:
            for line in path.read_text(encoding="ascii").splitlines():
                key, _, distance = line.partition(" ")
                uses[key] = min(int(distance), uses.get(key, NEVER))
        return uses

    def _make_room(self, content: _Content, num_bytes: int, next_use: int) -> bool:
        """Evict files needed later than ``next_use``, the latest first, until ``num_bytes`` fit; otherwise none."""
        excess = content.num_bytes + num_bytes - self.limit_bytes
        if excess <= 0:
            return True
        uses = self._next_uses(content)
        evicted: list[tuple[_File, int]] = []
        try:
            for file in sorted(content.files, key=lambda file: (-uses.get(file.key, NEVER), file.modified)):
                if excess <= 0 or uses.get(file.key, NEVER) <= next_use:
                    break
                descriptor = _lock_exclusively(file.path)
                if descriptor is not None:
                    evicted.append((file, descriptor))
                    excess -= file.num_bytes
            if excess > 0:
                return False
            for file, _ in evicted:
                file.path.unlink()
            return True
        finally:
            for _, descriptor in evicted:
                os.close(descriptor)


def available_bytes(folder: Path) -> int:
    """Return the bytes that a cache in a folder can use: its present files and the free space of the disk."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    used = 0
    if folder.is_dir():
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                used += entry.stat(follow_symlinks=False).st_size if _FILE.fullmatch(entry.name) else 0
    return used + shutil.disk_usage(existing).free


def _lock_exclusively(path: Path) -> int | None:
    """Return a descriptor that holds an exclusive lock on a file; None if the file is locked or does not exist."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
