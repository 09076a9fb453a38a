"""Uploading a shard set to a URL, shard by shard while it is packed, the manifest last.

Until the upload is complete, a marker object at the URL identifies the packing. Objects that already exist with the
right length were sent by an earlier attempt of the same packing and are not sent again.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from shards.errors import ShardError
from shards.format.set_manifest import FILE_NAME, JOURNAL_NAME, SetManifest, ShardEntry
from shards.format.tar_members import MAP_EXTENSIONS
from shards.packing.summary import count_reasons
from shards.storage.store import BULK_POLICY, Store

REJECTED_NAME = "rejected.jsonl"
MARKER_NAME = "packing.note"
_MAX_REJECTED_BYTES = 4 << 30  # one line for each image that was left out
_SET_NAMES = ("shards", "index", FILE_NAME, REJECTED_NAME, JOURNAL_NAME)


class Upload:
    """Sends the files of a set from the folder in which it is packed.

    Args:
        url: URL of the set.
        folder: folder in which the set is packed; the files of a shard are deleted once they are sent.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        if url.startswith(("http://", "https://")):
            raise ShardError(f"--out {url} is read-only; give a folder, or a URL such as s3://bucket/set")
        self._store = Store(url, BULK_POLICY)
        self._present: dict[str, int | None] = {}
        self._fingerprint = ""

    def find_finished(self, fingerprint: str) -> tuple[SetManifest, Counter[str] | None] | None:
        """Return the finished set at the URL and its rejected images by reason, or None if there is no set.

        Raises:
            ShardError: there is another set, or other files.
        """
        self._present = self._store.list_tree()
        foreign = [name for name in self._present if name.split("/")[0] not in _SET_NAMES]
        if foreign:
            raise ShardError(f"--out {self.url} has other files, such as {foreign[0]}; choose a new folder")
        if FILE_NAME not in self._present:
            return None
        manifest = SetManifest.fetch(self._store)
        if manifest.fingerprint != fingerprint:
            reason = "already contains another shard set, of other images or options"
            raise ShardError(f"--out {self.url} {reason}; choose a new folder, or delete it")
        if JOURNAL_NAME in self._present:  # left by an attempt that was interrupted just before its end
            self._store.remove(JOURNAL_NAME)
        if REJECTED_NAME not in self._present:
            return manifest, None
        return manifest, self._store.load(REJECTED_NAME, count_reasons, _MAX_REJECTED_BYTES)

    def begin(self, fingerprint: str, packed: list[ShardEntry]) -> None:
        """Check that the URL is empty or contains an earlier attempt of the same packing.

        Args:
            packed: shards that an earlier attempt has sent.

        Raises:
            ShardError: the URL contains something else, or one of these shards is missing.
        """
        if JOURNAL_NAME in self._present:
            if self._store.load(JOURNAL_NAME, bytes) != _marker(fingerprint):
                raise ShardError(
                    f"--out {self.url} contains an interrupted packing of another source or with other options; delete "
                    "it or choose a new folder"
                )
        elif self._present:
            raise ShardError(f"--out {self.url} has other files, such as {min(self._present)}; choose a new folder")
        missing = [entry.name for entry in packed if self._present.get(f"shards/{entry.name}") != entry.bytes]
        if missing:
            raise ShardError(f"{self.url}/shards/{missing[0]} is missing; to pack it again, delete {self.folder}")
        self._fingerprint = fingerprint

    def send_shard(self, entry: ShardEntry) -> None:
        """Send a complete shard with its indexes, and delete the local files."""
        if JOURNAL_NAME not in self._present:
            marker = self.folder / MARKER_NAME
            marker.write_bytes(_marker(self._fingerprint))
            self._send(marker, JOURNAL_NAME)
        stem = entry.name.removesuffix(".tar")
        indexes = [f"index/{entry.map_index_name(kind)}" for kind in MAP_EXTENSIONS]
        of_maps = [name for name in indexes if (self.folder / name).exists()]
        for name in (*of_maps, f"index/{stem}.npy", f"index/{stem}.idx", f"shards/{entry.name}"):
            self._send(self.folder / name, name)

    def finish(self, manifest: SetManifest) -> None:
        """Send the list of rejected images and the manifest, and remove the marker."""
        self._send(self.folder / REJECTED_NAME, REJECTED_NAME)
        manifest.save(self.folder)
        self._send(self.folder / FILE_NAME, FILE_NAME)
        self._store.remove(JOURNAL_NAME)

    def _send(self, source: Path, name: str) -> None:
        if self._present.get(name) != source.stat().st_size:
            self._store.upload(source, name)
            self._present[name] = source.stat().st_size
        source.unlink()


def _marker(fingerprint: str) -> bytes:
    return (json.dumps({"fingerprint": fingerprint}) + "\n").encode()
