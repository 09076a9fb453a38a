"""Atomic file writes, checksums, and bounded parsing of untrusted JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from shards.errors import ShardError
from shards.storage.paths import expand_path

_PIECE_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20  # parsing can take a few dozen times as much memory


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file atomically and durably: after a crash it has either the old or the new content.

    Neither a link at ``path`` nor one at the temporary name is followed; both are replaced. Raises OSError.
    """
    partial = partial_path(path)
    descriptor = create_file(partial)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)
    sync(path.parent)


def create_file(path: Path) -> int:
    """Return a descriptor, open for writing, of a new file; a file or link of this name is removed, never followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, 0o666)


def open_to_append(path: Path) -> int:
    """Return a descriptor, open for reading and appending, of a file that is created if missing; refuses a link."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all bytes of ``data``; a single call may write fewer."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync(path: Path) -> None:
    """Sync the content of a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a file, a folder with its contents, or only the link if ``path`` is one; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return the temporary name, in the same folder, under which a file is written."""
    return path.with_name(f".{path.name}.partial")


def remove_partials(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder."""
    for partial in folder.glob(".*.partial"):
        partial.unlink()


def cache_folder(option: str) -> Path:
    """Return streamtrain's folder in the user's own cache, created if missing; raises ShardError."""
    folder = Path(expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "streamtrain"
    make_private_folder(folder, option)
    return folder


def make_private_folder(folder: Path, option: str) -> None:
    """Create a folder that only this user can access, or check that an existing one belongs to this user.

    Args:
        option: setting that names the folder, for messages.

    Raises:
        ShardError: the folder is a link, belongs to another user or is writable for all, or cannot be created.
    """
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError as error:
        raise ShardError(
            f"{option} {folder} cannot be written to ({error.strerror}); choose another folder with {option}"
        ) from error
    owner = os.getuid() if hasattr(os, "getuid") else status.st_uid
    if not stat.S_ISDIR(status.st_mode):
        raise ShardError(f"{option} {folder} is a link or a file; choose a folder of your own with {option}")
    if status.st_uid != owner or status.st_mode & stat.S_IWOTH:
        raise ShardError(
            f"{option} {folder} belongs to another user or is writable for all; choose your own with {option}"
        )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def parse_json(content: bytes | str) -> Any:
    """Parse a JSON document.

    Raises:
        ValueError: the content is not JSON, larger than ``MAX_JSON_BYTES``, or nested too deep.
    """
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{len(content)} bytes are more than the limit of {MAX_JSON_BYTES}")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read and parse a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as ``parse_json``.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1))
