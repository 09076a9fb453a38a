"""``manifest.json``: the size and the checksum of every file of a checkpoint, by which damage to it is found.

    {"files": {"state.json": {"bytes": 512, "crc32": "0a1b2c3d"}, ...}, "crc32": that of "files"}

It is the last file that is written before the folder gets its name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from shards.format.files import read_json
from streamtrain.run.atomic_io import FileSum, sum_of, write_file

MANIFEST_NAME = "manifest.json"


def write_manifest(folder: Path, files: Mapping[str, FileSum]) -> None:
    """Write the manifest of ``files``, by their names in the folder."""
    entries = {name: {"bytes": one.num_bytes, "crc32": f"{one.crc32:08x}"} for name, one in files.items()}
    document = {"files": entries, "crc32": _sum_of_entries(entries)}
    write_file(folder / MANIFEST_NAME, json.dumps(document, indent=1).encode())


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """What each file must hold.

    Raises:
        OSError, ValueError: if the manifest cannot be read, or is not as it was written.
    """
    try:
        document = read_json(folder / MANIFEST_NAME)
        entries = document["files"]
        if document["crc32"] != _sum_of_entries(entries):
            raise ValueError("its checksum differs")
        return {name: FileSum(int(one["bytes"]), int(one["crc32"], 16)) for name, one in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{MANIFEST_NAME} is damaged ({error})") from None


def fault_of(folder: Path, *, contents: bool, part: tuple[int, int] = (0, 1)) -> str | None:
    """Why a folder is not whole, or None if it is.

    Args:
        contents: read the files and compare their checksums, not their sizes only.
        part: ``(index, count)``: read only every ``count``-th file, from ``index`` on; sizes are compared of all.
    """
    try:
        files = read_manifest(folder)
        for index, (name, wanted) in enumerate(files.items()):
            num_bytes = (folder / name).stat().st_size
            if num_bytes != wanted.num_bytes:
                return f"{name} has {num_bytes} bytes, not {wanted.num_bytes}"
            if contents and index % part[1] == part[0] and sum_of(folder / name) != wanted:
                return f"{name} holds other values than were written to it"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def _sum_of_entries(entries: object) -> str:
    return f"{zlib.crc32(json.dumps(entries).encode()):08x}"
