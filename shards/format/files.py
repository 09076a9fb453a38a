"""Atomic file writes, checksums, and bounded parsing of untrusted JSON."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

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
