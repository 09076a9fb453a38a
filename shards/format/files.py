"""Atomic file writes, checksums, and bounded parsing of untrusted JSON."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from shards.errors import ShardError

_PIECE_BYTES = 1 << 20
MAX_JSON_BYTES = 64 << 20  # parsing can take a few dozen times as much memory


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically and durably: under a temporary name, with fsync, then renamed."""
    partial = partial_path(path)
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def partial_path(path: Path) -> Path:
    """Return the temporary name, in the same folder, under which a file is written."""
    return path.with_name(f".{path.name}.partial")


def remove_partials(folder: Path) -> None:
    """Delete the temporary files that a killed process left in a folder."""
    for partial in folder.glob(".*.partial"):
        partial.unlink()


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
