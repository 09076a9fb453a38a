"""``manifest.json`` of a checkpoint: size and CRC-32 of every file, to detect damage.

    {"files": {"state.json": {"bytes": 512, "crc32": "0a1b2c3d"}, ...}, "crc32": checksum of "files"}

It is written last, before the folder is renamed to its final name.
"""

from __future__ import annotations

import json
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shards.format.files import read_json
from streamtrain.run.atomic_io import FileChecksum, compute_checksum, write_file

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class CheckpointManifest:
    """Size and CRC-32 of the files of a checkpoint, by their names."""

    files: Mapping[str, FileChecksum]

    def write(self, folder: Path) -> None:
        entries = {name: {"bytes": file.num_bytes, "crc32": f"{file.crc32:08x}"} for name, file in self.files.items()}
        document = {"files": entries, "crc32": _checksum_entries(entries)}
        write_file(folder / MANIFEST_NAME, json.dumps(document, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> CheckpointManifest:
        """Read the manifest of a folder; raises OSError, or ValueError if it is damaged."""
        try:
            document = read_json(folder / MANIFEST_NAME)
            entries = document["files"]
            if document["crc32"] != _checksum_entries(entries):
                raise ValueError("its checksum differs")
            files = {name: FileChecksum(int(file["bytes"]), int(file["crc32"], 16)) for name, file in entries.items()}
            if strange := [name for name in files if name != Path(name).name]:
                raise ValueError(f"{strange[0]!r} is not a file name")
            return cls(files)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{MANIFEST_NAME} is damaged ({error})") from None


def find_fault(folder: Path, *, contents: bool, part: tuple[int, int] = (0, 1)) -> str | None:
    """Return the fault of a checkpoint, or None if all files have the recorded sizes and checksums.

    Args:
        contents: compare checksums too, not only sizes.
        part: ``(index, count)``: compare the checksums of every ``count``-th file, starting at ``index``, and the
            sizes of all files.
    """
    try:
        manifest = CheckpointManifest.read(folder)
        for index, (name, recorded) in enumerate(manifest.files.items()):
            status = (folder / name).stat()
            # reading a pipe or a device may never end
            if not stat.S_ISREG(status.st_mode):
                return f"{name} is not a regular file"
            if status.st_size != recorded.num_bytes:
                return f"{name} has {status.st_size} bytes, not {recorded.num_bytes}"
            if contents and index % part[1] == part[0] and compute_checksum(folder / name) != recorded:
                return f"{name} has a wrong checksum"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def _checksum_entries(entries: object) -> str:
    return f"{zlib.crc32(json.dumps(entries).encode()):08x}"
