"""The folder of a cache, shared by the processes of a machine: what is in it, who needs it when, and what may go.

The folder is its own record, so that there is no second one that a killed process could leave wrong:

KEY.shard           a whole file; whoever reads it holds a shared lock on it
KEY.BYTES.partial   room for a file of so many bytes, made before the first of them comes; whoever fetches it holds an
                    exclusive lock on it
NAME.user           which files a process needs next, and when; it holds an exclusive lock on this as long as it lives
lock                held while room is made or given, and while a file gets its final name

The kernel lets go of a process's locks when it dies, however it dies, so nothing that it claimed needs clearing up:
its room goes to whoever fetches the same file, or to whoever needs room. Files of other names are not ours: they are
neither touched nor counted.
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

FAR = 2**62  # the next use of what nobody is known to need
# of a .user file: a line of 32 hex digits, a space, a distance and an end of line
USE_BYTES = 64
_FILE = re.compile(r"([0-9a-f]{32})\.(?:shard|(\d+)\.partial)")
_USER = re.compile(r"[0-9a-f]{32}\.user")
_POLL_SECONDS = 0.005


class Refusal(Enum):
    """Why no room was given."""

    PRESENT = "the file is there"
    BUSY = "somebody is fetching the file"
    FULL = "all that is there is in use, or needed sooner"


@dataclass(frozen=True)
class _File:
    path: Path
    key: str
    num_bytes: int  # that it may come to; of a whole file, that it has
    modified: float


@dataclass(frozen=True)
class _Content:
    """What is in the folder at a moment."""

    files: tuple[_File, ...]
    users: tuple[Path, ...]  # of living processes, but not our own
    user_bytes: int  # of those, and of our own

    @property
    def num_bytes(self) -> int:
        """That everything of ours may come to."""
        return sum(file.num_bytes for file in self.files) + self.user_bytes


class Reservation:
    """Room for a file, until it is committed, left or given back.

    Attributes:
        path: where the bytes go; holds what an earlier attempt has left.
    """

    def __init__(self, path: Path, descriptor: int, lock: filelock.BaseFileLock) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._lock = lock

    def commit(self) -> None:
        """The file is whole."""
        with self._lock.acquire(poll_interval=_POLL_SECONDS):
            self.leave()  # first, so that whoever sees the file can open it
            os.replace(self.path, self.path.with_name(f"{self.path.name.partition('.')[0]}.shard"))

    def leave(self) -> None:
        """Somebody may go on with what has come so far."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def give_back(self) -> None:
        """Drop what has come so far."""
        self.path.unlink(missing_ok=True)
        self.leave()


class Ledger:
    """One process's view of the folder. Safe to share between threads.

    Args:
        folder: of the cache; made if it is not there.
        limit_bytes: that the files of the cache must never exceed, those on their way counted in full.

    Raises:
        ShardError: the folder cannot be made or written to.
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
                self._make_room(self._content(), 0, due=-1)
        except OSError as error:
            raise ShardError(
                f"the cache folder {folder} cannot be used ({error.strerror}); give another folder"
            ) from error

    def open(self, key: str, num_bytes: int) -> int | None:
        """A descriptor of a whole file, which stays in the cache until that is closed; None where it is not there.

        Args:
            num_bytes: that it must have; a file of another length is dropped.
        """
        try:
            descriptor = os.open(self._whole(key), os.O_RDONLY)
        except FileNotFoundError:
            return None
        status = os.fstat(descriptor)
        if status.st_size == num_bytes:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except BlockingIOError:
                pass  # it is going, or has only just come
        os.close(descriptor)
        if status.st_size != num_bytes:
            self.discard(key)
        return None

    def reserve(self, key: str, num_bytes: int) -> Reservation | Refusal:
        """Room for a file, made where need be by deleting what is needed later than this file is.

        Nothing is deleted unless that makes room enough.
        """
        partial = self.folder / f"{key}.{num_bytes}.partial"
        assert _FILE.fullmatch(partial.name), partial.name
        with self._locked():
            if self._whole(key).exists():
                return Refusal.PRESENT
            if partial.exists():
                descriptor = _lock_exclusively(partial)
                if descriptor is None:
                    return Refusal.BUSY
            else:
                content = self._content()
                if not self._make_room(content, num_bytes, self._next_uses(content).get(key, FAR)):
                    return Refusal.FULL
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            return Reservation(partial, descriptor, self._lock)

    def publish(self, uses: Mapping[str, int]) -> None:
        """Tell the other processes when this one next needs which files.

        Args:
            uses: by key, in any unit that all processes share, 0 for now, soonest first. What of it finds no room
                within the limit is left out.
        """
        with self._locked():
            if self._descriptor is None:
                return  # closed meanwhile
            content = self._content()
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
        """Keys of the whole files."""
        return {name.removesuffix(".shard") for name in os.listdir(self.folder) if name.endswith(".shard")}

    def discard(self, key: str) -> None:
        """Drop a whole file, unless somebody has it open."""
        with self._locked():
            descriptor = _lock_exclusively(self._whole(key))
            if descriptor is not None:
                self._whole(key).unlink()
                os.close(descriptor)

    def close(self) -> None:
        """This process needs nothing any more."""
        with self._locked():
            self._user.unlink(missing_ok=True)
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _locked(self) -> filelock.AcquireReturnProxy:
        return self._lock.acquire(poll_interval=_POLL_SECONDS)

    def _whole(self, key: str) -> Path:
        return self.folder / f"{key}.shard"

    def _content(self) -> _Content:
        """Look into the folder, and take away what dead processes said they need."""
        files, users, user_bytes = [], [], 0
        for entry in os.scandir(self.folder):
            is_user = _USER.fullmatch(entry.name)
            named = _FILE.fullmatch(entry.name)
            if not (is_user or named) or not entry.is_file(follow_symlinks=False):
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
                continue  # given back just now
            if named:
                num_bytes = int(named[2]) if named[2] else status.st_size
                files.append(_File(path, named[1], num_bytes, status.st_mtime))
            else:
                user_bytes += status.st_size
        return _Content(tuple(files), tuple(users), user_bytes)

    def _next_uses(self, content: _Content) -> dict[str, int]:
        """When any living process next needs each file."""
        uses = dict(self._uses)
        for path in content.users:
            for line in path.read_text(encoding="ascii").splitlines():
                key, _, distance = line.partition(" ")
                uses[key] = min(int(distance), uses.get(key, FAR))
        return uses

    def _make_room(self, content: _Content, num_bytes: int, due: int) -> bool:
        """Delete what is needed later than ``due``, the latest first, until so many bytes fit; or nothing at all."""
        excess = content.num_bytes + num_bytes - self.limit_bytes
        if excess <= 0:
            return True
        uses = self._next_uses(content)
        going: list[tuple[_File, int]] = []
        try:
            for file in sorted(content.files, key=lambda file: (-uses.get(file.key, FAR), file.modified)):
                if excess <= 0 or uses.get(file.key, FAR) <= due:
                    break
                descriptor = _lock_exclusively(file.path)
                if descriptor is not None:
                    going.append((file, descriptor))
                    excess -= file.num_bytes
            if excess > 0:
                return False
            for file, _ in going:
                file.path.unlink()
            return True
        finally:
            for _, descriptor in going:
                os.close(descriptor)


def space_for(folder: Path) -> int:
    """Bytes that a cache in a folder can come to: what it has there already, and what the disk has free."""
    disk = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    mine = 0
    if folder.is_dir():
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                mine += entry.stat(follow_symlinks=False).st_size if _FILE.fullmatch(entry.name) else 0
    return mine + shutil.disk_usage(disk).free


def _lock_exclusively(path: Path) -> int | None:
    """A descriptor that holds an exclusive lock on a file; None where somebody has it open, or it is not there."""
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
