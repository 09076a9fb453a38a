"""The description of a shard set: ``manifest.json``, written last; without it a set is not one.

set/ shards/000000.tar   WebDataset tars
     index/000000.npy    one record a sample (shards/format/index.py)
     index/000000.idx    DALI's index
     manifest.json       this
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from shards.errors import ShardError
from shards.format.files import MAX_JSON_BYTES, parse_json, write_whole

VERSION = 1
# of a tar: a file of the set's own folders, whoever wrote the manifest
_NAME = re.compile(r"[^/\\\0]*[^/\\\0.][^/\\\0]*")
FILE_NAME = "manifest.json"
JOURNAL_NAME = "packing.jsonl"  # what a packing has done so far; there until the manifest is


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a set."""

    name: str  # of the file in shards/, such as 000000.tar
    bytes: int
    samples: int
    sha256: str  # of the tar
    url: str = ""  # of a tar that lies elsewhere: a URL or an absolute path; empty for shards/NAME of the set

    @property
    def fault(self) -> str | None:
        """What it cannot be, or None."""
        if not all(isinstance(text, str) for text in (self.name, self.sha256, self.url)):
            return "a name, checksum or URL is no text"
        if not _NAME.fullmatch(self.name):
            return f"{self.name!r} is no name of a tar"
        for number in (self.bytes, self.samples):
            if type(number) is not int or not 0 <= number < 2**53:
                return f"{number!r} is no number of bytes or samples"
        return None

    @property
    def index_name(self) -> str:
        """The file name of the shard's index in index/."""
        return self.name.removesuffix(".tar") + ".npy"


@dataclass(frozen=True)
class Manifest:
    """A shard set.

    Attributes:
        shards: its tars, in order.
        classes: class names by label; empty where labels have no names or there are none.
        fingerprint: of the source and the options it was packed from; empty where it was not packed here.
    """

    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def num_samples(self) -> int:
        """Images in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def extent(self) -> str:
        """How large the set is, for people: "20 images in 3 shards"."""
        return f"{counted(self.num_samples, 'image')} in {counted(len(self.shards), 'shard')}"

    @cached_property
    def digest(self) -> str:
        """32 hex digits over what defines the stream: each tar's name, sample count and content, in order."""
        content = json.dumps([[shard.name, shard.samples, shard.sha256] for shard in self.shards])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _fault(self) -> str | None:
        """What a manifest from elsewhere cannot hold, or None."""
        if not all(isinstance(text, str) for text in (*self.classes, self.fingerprint)):
            return "a class or the fingerprint is no text"
        return next((fault for shard in self.shards if (fault := shard.fault) is not None), None)

    def save(self, set_dir: Path | str) -> None:
        """Write ``manifest.json``, whole or not at all."""
        content = {
            "version": VERSION,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "digest": self.digest,
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_whole(Path(set_dir) / FILE_NAME, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, set_dir: Path | str) -> Manifest:
        """Read ``manifest.json`` of a set.

        Raises:
            ShardError: no such set, not finished, damaged, or of another version.
        """
        set_dir = Path(set_dir)
        path = set_dir / FILE_NAME
        try:
            with open(path, "rb") as file:
                return cls.parse(file.read(MAX_JSON_BYTES + 1), str(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ShardError(_why_absent(set_dir)) from error
        except OSError as error:
            raise ShardError(f"{path} cannot be read ({error}); copy the set again, or pack it again") from error

    @classmethod
    def parse(cls, text: bytes, path: str) -> Manifest:
        """The manifest in the bytes of a ``manifest.json``; raises as ``load``, calling the file ``path``."""
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ShardError(f"{path} cannot be read ({error}); copy the set again, or pack it again") from error
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise ShardError(f"{path} has version {version}, this program reads version {VERSION}; pack it again")
        try:
            shards = tuple(ShardEntry(**shard) for shard in content["shards"])
            manifest = cls(shards, tuple(content["classes"]), content["fingerprint"])
            stated = content["digest"]
            fault = manifest._fault()
        except (KeyError, TypeError) as error:
            raise ShardError(f"{path} lacks a field ({error}); copy the set again, or pack it again") from error
        if fault is not None:
            raise ShardError(f"{path} is damaged: {fault}; copy the set again, or pack it again")
        if stated != manifest.digest:
            raise ShardError(
                f"{path} was edited: its digest says {stated}, its content {manifest.digest}; copy the set again"
            )
        return manifest


def counted(number: int, noun: str) -> str:
    """A number of things, for people: "1 shard", "3 shards"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _why_absent(set_dir: Path) -> str:
    """What a place without a manifest is instead of a set, and what to do about it."""
    if not set_dir.exists():
        return f"no shard set at {set_dir}; make one with: streamtrain pack --src IMAGES --out {set_dir}"
    if not set_dir.is_dir():
        return f"{set_dir} is a file, not a shard set; give the folder that holds {FILE_NAME}"
    if (set_dir / JOURNAL_NAME).exists():
        return f"{set_dir} is not a finished shard set; go on with the make_shards command that began it"
    if next(set_dir.glob("*.tar"), None) is not None:
        return f"{set_dir} holds tars but no {FILE_NAME}; index them: streamtrain index --src {set_dir} --out SET"
    return f"{set_dir} is no shard set: it has no {FILE_NAME}; make one with streamtrain pack"
