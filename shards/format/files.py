"""Files that appear whole or not at all, and JSON that comes from anywhere."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_PIECE_BYTES = 1 << 20
# of a JSON document, which takes a few dozen times as much memory at the worst
MAX_JSON_BYTES = 64 << 20


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


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: it is none, or too large or too deep to be one of ours.
    """
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{len(content)} bytes are more than a description takes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: as ``parse_json``.
    """
    with open(path, "rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1))
