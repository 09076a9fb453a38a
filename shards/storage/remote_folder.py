"""A folder in a store as a place to list in depth and to write to; ``Store`` alone reads single objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from shards.errors import ShardError
from shards.storage.store import Patience, Store

# Listing a bucket, or sending a shard, is one attempt, and may take its time.
_PATIENCE = Patience(deadline_seconds=3600.0, stall_seconds=1200.0)
_READ_ONLY = ("http", "https")
# Asked for a folder, some of these would make a bucket.
_WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "oci", "oss")

Result = TypeVar("Result")


class RemoteFolder(Store):
    """Objects below a URL; arguments and errors as those of ``Store``."""

    def __init__(self, url: str, patience: Patience = _PATIENCE) -> None:
        super().__init__(url, patience)
        self._protocol = self.url.partition("://")[0]

    @property
    def writable(self) -> bool:
        """Whether its protocol can write at all."""
        return self._protocol not in _READ_ONLY

    def tree(self) -> dict[str, int | None]:
        """The names of all objects below, in any depth, sorted, with their lengths in bytes where these are known."""

        def ask() -> dict[str, int | None]:
            try:
                found = self._files.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {self._name_of(path): info.get("size") for path, info in found.items()}

        # an object by the folder's own name is how some tools make folders
        return {name: size for name, size in sorted(self.persist("", ask).items()) if name}

    def open(self, name: str) -> BinaryIO:
        """An object as a file that can be read anywhere."""
        return cast(BinaryIO, self.persist(name, lambda: self._files.open(self._path(name), "rb")))

    def upload(self, source: Path, name: str) -> None:
        """Send a file; it replaces what is there.

        Raises:
            ShardError: it cannot be written; names the object.
        """

        def send() -> None:
            if self._protocol not in _WITHOUT_FOLDERS:
                self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(source), self._path(name))

        try:
            self.persist(name, send)
        except ShardError as error:
            absent = isinstance(error.__cause__, FileNotFoundError)
            reason = "there is no such bucket" if absent else str(error)
            raise ShardError(
                f"{self.url_of(name)} cannot be written ({reason}); mend that and run this again to go on"
            ) from error

    def remove(self, name: str) -> None:
        """Take an object away, if it is there."""

        def take() -> None:
            if self._files.exists(self._path(name)):
                self._files.rm_file(self._path(name))

        self.persist(name, take)

    def persist(self, name: str, attempt: Callable[[], Result]) -> Result:
        """Whatever is to be tried again until it works; an error names the object."""
        return self._persist(name, attempt)

    def _name_of(self, path: str) -> str:
        return path.lstrip("/").removeprefix(self._root.strip("/")).lstrip("/")


def writable_folder(url: str) -> RemoteFolder:
    """The folder at a URL.

    Raises:
        ShardError: as ``Store``, or its protocol cannot write.
    """
    folder = RemoteFolder(url)
    if not folder.writable:
        raise ShardError(f"--out {url} cannot be written to; give a folder, or a URL such as s3://bucket/set")
    return folder
