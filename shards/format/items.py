"""One image to pack and where its bytes lie; all the images of a source, in order."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from shards import randomness
from shards.errors import ShardError
from shards.format import images
from shards.format.index import NO_LABEL
from shards.storage.store import Store

_KEY_LENGTH = 60


class SourceUnreachable(ShardError):
    """The source, or the way to it, fails; unlike a bad image, that must not leave out anything."""


class Place(Protocol):
    """Where an image's bytes lie. Small, and picklable."""

    @property
    def mark(self) -> str:
        """What tells it from others of the same name."""

    def read(self) -> bytes:
        """The image's bytes.

        Raises:
            ShardError: it cannot be read, with the reason.
            SourceUnreachable: nothing can be read just now.
        """


@dataclass(frozen=True)
class FileRange:
    """A whole local file, or a range of one."""

    path: Path
    offset: int = 0
    length: int | None = None  # bytes; None is the whole file

    @property
    def mark(self) -> str:
        """As ``Place.mark``."""
        length = self.length
        if length is None:
            with suppress(OSError):
                length = self.path.stat().st_size
        return f"{self.offset}\t{length}"

    def read(self) -> bytes:
        """As ``Place.read``."""
        try:
            status = self.path.stat()
            # opening a pipe would wait for somebody to write into it
            if not stat.S_ISREG(status.st_mode):
                raise ShardError("not a regular file")
            length = status.st_size if self.length is None else self.length
            _check_length(length)
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(length)
        except OSError as error:
            raise ShardError(error.strerror or str(error)) from error


@dataclass(frozen=True)
class RemoteObject:
    """A whole object in a store."""

    folder: str  # URL
    name: str  # below it
    num_bytes: int | None = None  # where that is known

    @property
    def mark(self) -> str:
        """As ``Place.mark``."""
        return f"{self.folder}\t{self.num_bytes}"

    def read(self) -> bytes:
        """As ``Place.read``."""
        _check_length(self.num_bytes or 0)
        try:
            return store_at(self.folder).load(self.name, bytes)
        except ShardError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise ShardError("it does not exist any more") from error
            raise SourceUnreachable(f"{error}; once it can be read, run this again to go on") from error


@lru_cache(maxsize=8)
def store_at(folder: str) -> Store:
    """The store of a folder, opened once a process."""
    return Store(folder)


def _check_length(length: int) -> None:
    if length > images.MAX_BYTES:
        raise ShardError(f"the file has {length} bytes, more than {images.MAX_BYTES}")


@dataclass(frozen=True)
class Item:
    """One image to pack."""

    name: str  # relative to the source, with slashes
    label: int
    place: Place


@dataclass(frozen=True)
class Inputs:
    """Everything to pack, in order.

    Attributes:
        classes: class names by label; empty where labels have no names or there are none.
        num_ignored: files beside the images.
        runs: lengths of the runs of items that are read together; empty where each is read by itself.
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    num_ignored: int
    runs: tuple[int, ...] = ()

    def fingerprint(self, options: str) -> str:
        """32 hex digits that tell this packing from another: what is packed and how."""
        digest = hashlib.sha256(options.encode())
        for item in self.items:
            digest.update(f"\n{item.name}\t{item.label}\t{item.place.mark}".encode(errors="surrogateescape"))
        return digest.hexdigest()[:32]

    def order(self, seed: int | None) -> np.ndarray:
        """The numbers of the items in the order in which to pack them, int64 [num_items]; None: as they come.

        A shuffle moves runs as wholes and mixes within each: one shard has many runs, and no run is read twice.
        """
        if seed is None:
            return np.arange(len(self.items))
        if not self.runs:
            return randomness.permutation(seed, randomness.PACKING, len(self.items))
        starts = np.concatenate([[0], np.cumsum(self.runs)])
        runs = randomness.permutation(seed, randomness.PACKING, len(self.runs), 1).tolist()
        return np.concatenate(
            [starts[run] + randomness.permutation(seed, randomness.PACKING, self.runs[run], 2, run) for run in runs]
        )


def sample_key(number: int, name: str) -> str:
    """The WebDataset key of an image: its number in the source, so that it is unique, and the tail of its path."""
    stem = str(PurePosixPath(name).with_suffix(""))
    return f"{number:09d}_{re.sub('[^A-Za-z0-9_-]+', '_', stem)[-_KEY_LENGTH:].strip('_')}".rstrip("_")


def with_class_folders(items: Sequence[Item], num_ignored: int) -> Inputs:
    """Labels from the first folder in which the images differ."""
    folders = [PurePosixPath(item.name).parent.parts for item in items]
    shared = 0
    while folders and all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    owners = [parts[shared] if len(parts) > shared else "" for parts in folders]
    classes = tuple(sorted(set(owners) - {""}))
    number = {name: label for label, name in enumerate(classes)}
    labelled = [replace(item, label=number.get(owner, NO_LABEL)) for item, owner in zip(items, owners, strict=True)]
    return Inputs(tuple(labelled), classes, num_ignored)


def with_class_names(names: Sequence[str | None]) -> tuple[tuple[str, ...], list[int]]:
    """Class names in order, and the label of each item that bears one of them."""
    classes = tuple(sorted({name for name in names if name}))
    number = {name: label for label, name in enumerate(classes)}
    return classes, [number[name] if name else NO_LABEL for name in names]
