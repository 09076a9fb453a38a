"""Writing one shard: a USTAR WebDataset tar under a temporary name, its two indexes, then the rename."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.format.files import create_file, partial_path, write_whole
from shards.format.images import PreparedImage
from shards.format.index import make_dali_index, make_map_record
from shards.format.records import RECORD, save_index
from shards.format.set_manifest import ShardEntry
from shards.format.tar_members import LABEL_EXTENSION, NO_LABEL, Component, Sample
from shards.packing.maps import PreparedMap

_BLOCK = tarfile.BLOCKSIZE


class ShardWriter:
    """Writes one shard of a set; the bytes depend only on the samples added.

    Args:
        set_dir: folder of the set, with the subfolders ``shards/`` and ``index/``.
        number: number of the shard in the set.

    Attributes:
        num_bytes: size of the tar so far.
        num_maps: number of maps so far, by kind.
    """

    def __init__(self, set_dir: Path, number: int) -> None:
        self._tar = set_dir / "shards" / f"{number:06d}.tar"
        self._index = set_dir / "index" / f"{number:06d}"
        self._file = open(create_file(partial_path(self._tar)), "wb")  # noqa: SIM115 - closed by finish and discard
        self._hash = hashlib.sha256()
        self._records: list[tuple[int, ...]] = []
        self._samples: list[Sample] = []
        self._map_records: dict[str, dict[int, np.ndarray]] = {}  # by kind and number of the sample
        self.num_bytes = 0

    @property
    def num_maps(self) -> dict[str, int]:
        return {kind: len(records) for kind, records in self._map_records.items()}

    @staticmethod
    def bytes_for(image: PreparedImage, label: int, maps: Sequence[PreparedMap] = ()) -> int:
        """Return the bytes that adding an image would add to the tar."""
        payloads = [image.payload, *(each.payload for each in maps)]
        num_bytes = sum(_BLOCK + _padded(len(payload)) for payload in payloads)
        return num_bytes if label == NO_LABEL else num_bytes + 2 * _BLOCK

    def add(self, key: str, image: PreparedImage, label: int, maps: Sequence[PreparedMap] = ()) -> None:
        components = [self._member(key, image.extension, image.payload)]
        if label != NO_LABEL:
            components.append(self._member(key, LABEL_EXTENSION, str(label).encode()))
        for each in maps:
            components.append(self._member(key, each.extension, each.payload))
            record = make_map_record(components[-1].offset, each.payload)
            self._map_records.setdefault(each.kind, {})[len(self._samples)] = record
        crc32 = zlib.crc32(image.payload)
        self._records.append((components[0].offset, len(image.payload), crc32, image.width, image.height, label, 0))
        self._samples.append(Sample(key, tuple(components), components[0], label))

    def finish(self) -> ShardEntry:
        """Complete the tar and its indexes durably under their final names."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.num_bytes % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = ShardEntry(self._tar.name, self.num_bytes, len(self._records), self._hash.hexdigest())
        for kind, found in self._map_records.items():
            records = np.zeros(entry.samples, dtype=RECORD)
            records[list(found)] = list(found.values())
            save_index(records, self._index.with_name(entry.map_index_name(kind)))
        save_index(np.array(self._records, dtype=RECORD), self._index.with_suffix(".npy"))
        write_whole(self._index.with_suffix(".idx"), make_dali_index(tuple(self._samples)))
        os.replace(partial_path(self._tar), self._tar)
        return entry

    def discard(self) -> None:
        self._file.close()
        partial_path(self._tar).unlink(missing_ok=True)

    def _member(self, key: str, extension: str, content: bytes) -> Component:
        header = tarfile.TarInfo(f"{key}.{extension}")
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(content)
        self._write(bytes(_padded(len(content)) - len(content)))
        return Component(extension, offset, len(content), header.name)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.num_bytes += len(content)


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK
