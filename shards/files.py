"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_PIECE_BYTES = 1 << 20


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, make it durable, and rename it: no reader sees a part of it."""
    partial = partial_path(path)
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def partial_path(path: Path) -> Path:
    """The temporary name beside a file under which it is written."""
    return path.with_name(f".{path.name}.partial")


def remove_partials(folder: Path) -> None:
    """Take away the temporary files that a killed process left in a folder."""
    for partial in folder.glob(".*.partial"):
        partial.unlink()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
