"""The images of a source, in order, and the location of each one's bytes."""

from __future__ import annotations

import errno
import hashlib
import re
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

import numpy as np

from shards import randomness
from shards.credentials import split_query, strip_credentials
from shards.errors import ShardError, SourceUnreachable, explain_os_error, is_source_failure
from shards.format import images
from shards.format.tally import Tally
from shards.format.tar_members import NO_LABEL
from shards.storage.answers import TooLong
from shards.storage.store import Store

MAX_ITEMS = 50_000_000  # each takes several hundred bytes of memory
# zipfile checks the directory and the headers only in part
ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError),
    *(ValueError, ArithmeticError, RuntimeError, LookupError),
)
_KEY_LENGTH = 60
_PAUSES = (0.2, 1.0)  # seconds before a read is tried again

Result = TypeVar("Result")


class Location(Protocol):
    """Location of an image's bytes; small, picklable and hashable."""

    def __hash__(self) -> int: ...

    @property
    def identity(self) -> str:
        """Text that distinguishes locations with the same item name; part of the packing's fingerprint.

        Raises:
            SourceUnreachable: the whole source cannot be reached at the moment.
        """

    def read(self) -> bytes:
        """Return the image's bytes.

        Raises:
            ShardError: the image cannot be read; gives the reason.
            SourceUnreachable: the whole source cannot be reached at the moment.
        """


@dataclass(frozen=True, slots=True)
class FileSpan:
    """A local file, or a span of one."""

    path: Path
    offset: int = 0
    length: int | None = None  # bytes; None is the whole file

    @property
    def identity(self) -> str:
        length = self.length
        if length is None:
            try:
                length = read_source(self.path, lambda: self.path.stat().st_size)
            except OSError:
                length = None  # the file is missing, which its read reports
        return f"{self.offset}\t{length}"

    def read(self) -> bytes:
        return self._retried(self._read)

    def _read(self) -> bytes:
        length = self._num_bytes()
        _check_length(length)
        return self._read_part(0, length)

    def num_bytes(self) -> int:
        """Return the length of the span in bytes; raises as ``read``."""
        return self._retried(self._num_bytes)

    def read_part(self, begin: int, end: int) -> bytes:
        """Return the bytes [begin, end) of the span, fewer if the file is shorter; raises as ``read``."""
        return self._retried(lambda: self._read_part(begin, end))

    def _retried(self, call: Callable[[], Result]) -> Result:
        try:
            return read_source(self.path, call)
        except OSError as error:
            raise ShardError(error.strerror or str(error)) from error

    def _num_bytes(self) -> int:
        status = self.path.stat()
        # opening a named pipe would block until another process writes to it
        if not stat.S_ISREG(status.st_mode):
            raise ShardError("not a regular file")
        return status.st_size if self.length is None else self.length

    def _read_part(self, begin: int, end: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset + begin)
            return file.read(end - begin)


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A file in a local zip archive."""

    path: Path
    number: int  # in the order of the archive's directory
    num_bytes: int  # as the directory says, which zipfile enforces

    @property
    def identity(self) -> str:
        return f"{self.number}\t{self.num_bytes}"

    def read(self) -> bytes:
        _check_length(self.num_bytes)
        try:
            return read_source(self.path, self._read)
        except OSError as error:
            raise ShardError(error.strerror or str(error)) from error
        except ZIP_ERRORS as error:
            raise ShardError(f"cannot be unpacked ({error})") from error

    def _read(self) -> bytes:
        archive = open_zip(self.path)
        with archive.open(archive.infolist()[self.number]) as file:
            return file.read(self.num_bytes)


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """An object in a store."""

    folder: str  # URL
    name: str  # relative to the folder
    num_bytes: int | None = None  # if known

    @property
    def identity(self) -> str:
        # passwords may change while packing is resumed; a query may be all that separates two images
        query = split_query(self.name)[1]
        return f"{strip_credentials(self.folder)}\t{self.num_bytes}" + (f"\t{query}" if query else "")

    def read(self) -> bytes:
        _check_length(self.num_bytes or 0)
        try:
            return cached_store(self.folder).load(self.name, bytes, self.num_bytes or images.MAX_BYTES)
        except ShardError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise ShardError("it does not exist any more") from error
            if isinstance(error.__cause__, TooLong):
                raise ShardError(str(error.__cause__)) from error
            raise SourceUnreachable(f"{error}; once it can be read, re-run to resume") from error


cached_store = lru_cache(maxsize=8)(Store)


@lru_cache(maxsize=1)
def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip archive, cached for the reads of its other members."""
    return zipfile.ZipFile(path)


def read_source(path: Path | str, read: Callable[[], Result]) -> Result:
    """Return ``read()``, retried for about a second if the file system or the process fails.

    EIO counts as such a failure, because network mounts raise it for intact files.

    Raises:
        SourceUnreachable: the failure persists; names the file and the remedy.
        OSError: the error concerns this file only.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if not (is_source_failure(error) or error.errno == errno.EIO):
                raise
            if pause is None:
                raise SourceUnreachable(
                    f"{path} cannot be read ({explain_os_error(error)}); once it can be read, re-run to resume"
                ) from error
            time.sleep(pause)
    raise AssertionError


def _check_length(length: int) -> None:
    if length > images.MAX_BYTES:
        raise ShardError(f"the file has {length} bytes, more than {images.MAX_BYTES}")


@dataclass(frozen=True, slots=True)
class Refused:
    """An image that was found to be unusable before packing."""

    reason: str

    @property
    def identity(self) -> str:
        return self.reason

    def read(self) -> bytes:
        raise ShardError(self.reason)


@dataclass(frozen=True, slots=True)
class ItemMap:
    """A map of an image that is to be packed."""

    kind: str  # of MAP_KINDS
    extension: str  # of the member, such as seg.png
    location: Location


@dataclass(frozen=True, slots=True)
class Item:
    name: str  # relative to the source, with slashes
    label: int
    location: Location
    tile: tuple[int, int] | None = None  # row and column in the image; None is the whole image
    maps: tuple[ItemMap, ...] = ()

    @property
    def tile_name(self) -> str:
        """Text for the row and column of the tile, such as ``r000_c003``; empty for a whole image."""
        return "r{:03d}_c{:03d}".format(*self.tile) if self.tile else ""


@dataclass(frozen=True)
class Inputs:
    """All images to pack, in order.

    Attributes:
        classes: class names by label; empty if labels have no names or there are no labels.
        passed_over: counts of the files and labels that are not used.
        runs: lengths of the runs of items that are read together; empty if each item is read separately.
        keeps_runs: the items of a run stay in order when packing shuffles.
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    passed_over: Tally = field(default_factory=Tally)
    runs: tuple[int, ...] = ()
    keeps_runs: bool = False

    def fingerprint(self, options: str) -> str:
        """Return 32 hex digits that identify the packing: the items and the options."""
        digest = hashlib.sha256(options.encode())
        for item in self.items:
            digest.update(f"\n{item.name}\t{item.label}\t{item.location.identity}".encode(errors="surrogateescape"))
            for each in item.maps:
                digest.update(f"\t{each.extension}\t{each.location.identity}".encode())
        return digest.hexdigest()[:32]

    def order(self, seed: int | None) -> np.ndarray:
        """Return the packing order as item numbers, int64 [num_items]; None keeps the source's order.

        Runs are permuted as a whole and shuffled within unless ``keeps_runs``, so that each run is read once.
        """
        if seed is None:
            return np.arange(len(self.items))
        if not self.runs:
            return randomness.permutation(seed, randomness.PACKING, len(self.items))
        starts = np.concatenate([[0], np.cumsum(self.runs)])
        runs = randomness.permutation(seed, randomness.PACKING, len(self.runs), 1).tolist()
        if self.keeps_runs:
            return np.concatenate([np.arange(starts[run], starts[run + 1]) for run in runs])
        return np.concatenate(
            [starts[run] + randomness.permutation(seed, randomness.PACKING, self.runs[run], 2, run) for run in runs]
        )


def sample_key(number: int, name: str, tile_name: str = "") -> str:
    """Return an item's WebDataset key: its number in the source, which makes it unique, and the end of its path."""
    stem = "_".join(filter(None, (str(PurePosixPath(name).with_suffix("")), tile_name)))
    return f"{number:09d}_{re.sub('[^A-Za-z0-9_-]+', '_', stem)[-_KEY_LENGTH:].strip('_')}".rstrip("_")


def label_by_folder(items: Sequence[Item], passed_over: Tally) -> Inputs:
    """Label each item by its class folder: the first folder level at which the items differ."""
    folders = [PurePosixPath(item.name).parent.parts for item in items]
    shared = 0
    while folders and all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    classes, labels = number_classes([parts[shared] if len(parts) > shared else "" for parts in folders])
    labelled = [replace(item, label=label) for item, label in zip(items, labels, strict=True)]
    return Inputs(tuple(labelled), classes, passed_over)


def number_classes(names: Sequence[str | None]) -> tuple[tuple[str, ...], list[int]]:
    """Return the sorted class names and the label of each item; an empty name gives ``NO_LABEL``."""
    classes = tuple(sorted({name for name in names if name}))
    labels = {name: label for label, name in enumerate(classes)}
    return classes, [labels[name] if name else NO_LABEL for name in names]
