"""A shard set on its way to a URL: shard by shard as they are packed, the manifest last.

While it goes on, an object at the URL tells which packing it is; what is there already with its right length was sent
by an earlier attempt at the very same, and is not sent again.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from shards.errors import ShardError
from shards.format.set_manifest import FILE_NAME, JOURNAL_NAME, Manifest, ShardEntry
from shards.storage.remote_folder import writable_folder

REJECTED_NAME = "rejected.jsonl"
NOTE_NAME = "packing.note"
_OURS = ("shards", "index", FILE_NAME, REJECTED_NAME, JOURNAL_NAME)


class Upload:
    """Sends a set's files from the folder in which it is packed.

    Args:
        url: of the set.
        folder: where it is packed; a shard's files leave it once they are sent.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self._remote = writable_folder(url)
        self._there: dict[str, int | None] = {}
        self._fingerprint = ""

    def finished(self, fingerprint: str) -> tuple[Manifest, int | None] | None:
        """The set that is there already and how many images it rejected, if it is the very one that is to be made.

        Raises:
            ShardError: something else is there.
        """
        self._there = self._remote.tree()
        foreign = [name for name in self._there if name.split("/")[0] not in _OURS]
        if foreign:
            raise ShardError(f"--out {self.url} holds other files, such as {foreign[0]}; choose a new folder")
        if FILE_NAME not in self._there:
            return None
        manifest = self._remote.load(FILE_NAME, partial(Manifest.parse, path=self._remote.url_of(FILE_NAME)))
        if manifest.fingerprint != fingerprint:
            raise ShardError(f"--out {self.url} already holds another shard set; choose a new folder, or delete that")
        if JOURNAL_NAME in self._there:  # of an attempt that was ended at its very end
            self._remote.remove(JOURNAL_NAME)
        if REJECTED_NAME not in self._there:
            return manifest, None
        return manifest, self._remote.load(REJECTED_NAME, lambda content: len(content.splitlines()))

    def begin(self, fingerprint: str, packed: list[ShardEntry]) -> None:
        """See that nothing but an earlier attempt at the same has begun there.

        Args:
            packed: shards that are known to be there.

        Raises:
            ShardError: something else has begun there, or one of these shards is there no more.
        """
        if JOURNAL_NAME in self._there:
            if self._remote.load(JOURNAL_NAME, bytes) != _note(fingerprint):
                raise ShardError(
                    f"--out {self.url} holds an interrupted packing of another source or with other options; delete "
                    "it or choose a new folder"
                )
        elif self._there:
            raise ShardError(f"--out {self.url} holds other files, such as {min(self._there)}; choose a new folder")
        gone = [entry.name for entry in packed if self._there.get(f"shards/{entry.name}") != entry.bytes]
        if gone:
            raise ShardError(f"{self.url}/shards/{gone[0]} is gone; to pack it anew, delete {self.folder}")
        self._fingerprint = fingerprint

    def shard(self, entry: ShardEntry) -> None:
        """Send a complete shard with its indexes, and take it away here."""
        if JOURNAL_NAME not in self._there:
            note = self.folder / NOTE_NAME
            note.write_bytes(_note(self._fingerprint))
            self._send(note, JOURNAL_NAME)
        stem = entry.name.removesuffix(".tar")
        for name in (f"index/{stem}.npy", f"index/{stem}.idx", f"shards/{entry.name}"):
            self._send(self.folder / name, name)

    def finish(self, manifest: Manifest) -> None:
        """Send what comes last, and forget what was here."""
        self._send(self.folder / REJECTED_NAME, REJECTED_NAME)
        manifest.save(self.folder)
        self._send(self.folder / FILE_NAME, FILE_NAME)
        self._remote.remove(JOURNAL_NAME)

    def _send(self, source: Path, name: str) -> None:
        if self._there.get(name) != source.stat().st_size:
            self._remote.upload(source, name)
            self._there[name] = source.stat().st_size
        source.unlink()


def _note(fingerprint: str) -> bytes:
    return (json.dumps({"fingerprint": fingerprint}) + "\n").encode()
