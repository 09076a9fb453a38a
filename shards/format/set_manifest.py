"""Manifest of a shard set: ``manifest.json``, written last, so that a set without it is unfinished.

set/ shards/000000.tar   WebDataset tars
     index/000000.npy    one record per sample (shards/format/index.py)
     index/000000.idx    DALI's index
     index/000000.seg.npy, index/000000.depth.npy    the same records of the images' maps, if there are any
     manifest.json       this manifest
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from shards.errors import ShardError, explain_os_error, read_remedy
from shards.format.files import MAX_JSON_BYTES, parse_json, write_whole
from shards.format.pixels import DTYPES, MAX_CHANNELS, RGB, PixelFormat
from shards.format.statistics import Statistics
from shards.format.tar_members import MAP_EXTENSIONS
from shards.storage.store import Store, is_url

VERSION = 1
# valid tar names: plain file names, so that an untrusted manifest cannot refer to files outside the set
_NAME = re.compile(r"[^/\\\0]*[^/\\\0.][^/\\\0]*")
FILE_NAME = "manifest.json"
_FIELDS = ("version", "num_samples", "num_bytes", "digest", "fingerprint", "classes", "shards", "checksum")
_OPTIONAL_FIELDS = ("channels", "dtype", "statistics", "maps")
_HEX = re.compile("[0-9a-f]*")
_REMEDY = "copy the set again, or pack it again"
JOURNAL_NAME = "packing.jsonl"  # progress of a packing; deleted once the manifest is written


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a set."""

    name: str  # file name in shards/, such as 000000.tar
    bytes: int
    samples: int
    sha256: str  # of the tar
    url: str = ""  # URL or absolute path of a tar outside the set; empty for shards/NAME of the set

    @property
    def index_name(self) -> str:
        """File name of the shard's index in index/."""
        return self.name.removesuffix(".tar") + ".npy"

    def map_index_name(self, kind: str) -> str:
        """File name in index/ of the records of the maps of a kind."""
        return f"{self.name.removesuffix('.tar')}.{kind}.npy"


@dataclass(frozen=True)
class SetManifest:
    """Manifest of a shard set.

    Attributes:
        shards: the tars, in order.
        classes: class names by label; empty if labels have no names or there are no labels.
        fingerprint: identifies the source and the packing options; empty if the tars were indexed, not packed.
        pixels: channels and dtype of all images; in the file only if it is not 8-bit RGB.
        statistics: of the images, if they were computed.
        maps: number of images with a map in each shard, by the kind of map; absent kinds are left out.
        faults: defects of the file that do not affect reading the images, as text.
    """

    shards: tuple[ShardEntry, ...]
    classes: tuple[str, ...] = ()
    fingerprint: str = ""
    pixels: PixelFormat = RGB
    statistics: Statistics | None = None
    maps: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    faults: tuple[str, ...] = field(default=(), compare=False)

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def extent(self) -> str:
        """Size of the set as text, such as "20 images in 3 shards"."""
        return f"{counted(self.num_samples, 'image')} in {counted(len(self.shards), 'shard')}"

    @cached_property
    def digest(self) -> str:
        """32 hex digits that identify the stream: each tar's name, sample count and SHA-256, in order."""
        content = json.dumps([[shard.name, shard.samples, shard.sha256] for shard in self.shards])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def save(self, set_dir: Path | str) -> None:
        content: dict[str, Any] = {
            "version": VERSION,
            "num_samples": self.num_samples,
            "num_bytes": self.num_bytes,
            "digest": self.digest,
            "fingerprint": self.fingerprint,
            "classes": self.classes,
            "shards": [asdict(shard) for shard in self.shards],
        }
        if not self.pixels.is_rgb:
            content |= asdict(self.pixels)
        if self.statistics is not None:
            content["statistics"] = asdict(self.statistics)
        if self.maps:
            content["maps"] = dict(self.maps)
        content["checksum"] = _checksum(content)
        write_whole(Path(set_dir) / FILE_NAME, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, location: Path | str) -> SetManifest:
        """Read the manifest of a set in a folder or at a URL.

        Raises:
            ShardError: the set is missing or unfinished, or the manifest is damaged or of another version.
        """
        if is_url(str(location)):
            return cls.fetch(Store(str(location)))
        set_dir = Path(location)
        path = set_dir / FILE_NAME
        try:
            with open(path, "rb") as file:
                return cls.parse(file.read(MAX_JSON_BYTES + 1), str(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ShardError(_explain_missing(set_dir)) from error
        except OSError as error:
            remedy = read_remedy(error, _REMEDY)
            raise ShardError(f"{path} cannot be read ({explain_os_error(error)}); {remedy}") from error

    @classmethod
    def fetch(cls, store: Store) -> SetManifest:
        """Read the manifest of the set in a store; raises as ``load``."""
        return store.load(FILE_NAME, partial(cls.parse, path=store.url_of(FILE_NAME)))

    @classmethod
    def parse(cls, text: bytes, path: str) -> SetManifest:
        """Parse the bytes of a ``manifest.json``; raises as ``load``, naming the file ``path``."""
        try:
            content = parse_json(text)
        except ValueError as error:
            raise ShardError(f"{path} cannot be read ({error}); {_REMEDY}") from error
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int or version != VERSION:
            raise ShardError(f"{path} has version {version}, this version reads {VERSION}; pack the set again")
        try:
            shards = tuple(ShardEntry(**shard) for shard in content["shards"])
            pixels = PixelFormat(content.get("channels", RGB.channels), content.get("dtype", RGB.dtype))
            statistics = Statistics.parse(content["statistics"], pixels) if "statistics" in content else None
            # versions to come may have other kinds of maps
            maps = {kind: tuple(counts) for kind, counts in content.get("maps", {}).items() if kind in MAP_EXTENSIONS}
            manifest = cls(shards, tuple(content["classes"]), content["fingerprint"], pixels, statistics, maps)
            stated = content["digest"]
            invalid = _find_error(manifest)
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ShardError(f"{path} misses a field or has an invalid one ({error}); {_REMEDY}") from error
        if invalid is not None:
            raise ShardError(f"{path} is damaged: {invalid}; {_REMEDY}")
        if stated != manifest.digest:
            raise ShardError(f"{path} was edited: digest {stated}, expected {manifest.digest}; copy the set again")
        return replace(manifest, faults=tuple(_find_faults(content, manifest)))


def counted(number: int, noun: str) -> str:
    """Return a count with its noun: "1 shard", "3 shards"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _find_error(manifest: SetManifest) -> str | None:
    """Return the first invalid value of an untrusted manifest, as text, or None."""
    if not all(isinstance(text, str) for text in (*manifest.classes, manifest.fingerprint)):
        return "a class or the fingerprint is not a string"
    pixels = manifest.pixels
    if type(pixels.channels) is not int or not 1 <= pixels.channels <= MAX_CHANNELS or pixels.dtype not in DTYPES:
        return f"{pixels.channels!r} channels of {pixels.dtype!r} are not supported"
    for shard in manifest.shards:
        if not all(isinstance(text, str) for text in (shard.name, shard.sha256, shard.url)):
            return "a name, checksum or URL is not a string"
        if not _NAME.fullmatch(shard.name):
            return f"{shard.name!r} is not a valid tar name"
        for number in (shard.bytes, shard.samples):
            if type(number) is not int or not 0 <= number < 2**53:
                return f"{number!r} is not a number of bytes or samples"
    for kind, counts in manifest.maps.items():
        if len(counts) != len(manifest.shards) or any(
            type(count) is not int or not 0 <= count <= shard.samples
            for count, shard in zip(counts, manifest.shards, strict=False)
        ):
            return f"the numbers of {kind} maps do not match the shards"
    return None


def _find_faults(content: Mapping[str, Any], manifest: SetManifest) -> Iterator[str]:
    """Yield the defects that leave the images readable: those of fields that training does not use."""
    for name in ("num_samples", "num_bytes"):
        actual, stated = getattr(manifest, name), content.get(name)
        if type(stated) is not int or stated != actual:
            yield f"{name} is {stated!r}, the shards have {actual} together"
    if not _HEX.fullmatch(manifest.fingerprint):
        yield f"the fingerprint {manifest.fingerprint!r} is not a hexadecimal number"
    for shard in manifest.shards:
        if len(shard.sha256) != 64 or not _HEX.fullmatch(shard.sha256):
            yield f"{shard.sha256!r} is not a SHA-256 checksum"
    for name in content:
        if name not in (*_FIELDS, *_OPTIONAL_FIELDS):
            yield f"unknown field {name!r}"
    # manifests of earlier versions have no checksum
    if content.get("checksum", expected := _checksum(content)) != expected:
        yield f"a field was changed: the checksum is {content['checksum']!r}, expected {expected!r}"


def _checksum(content: Mapping[str, Any]) -> str:
    """Return a checksum of all fields but "checksum", as 32 hex digits."""
    fields = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _explain_missing(set_dir: Path) -> str:
    if not set_dir.exists():
        return f"no shard set at {set_dir}; make one with: streamtrain pack --src IMAGES --out {set_dir}"
    if not set_dir.is_dir():
        return f"{set_dir} is a file, not a shard set; give the folder that contains {FILE_NAME}"
    if (set_dir / JOURNAL_NAME).exists():
        return f"{set_dir} is not a finished shard set; re-run the same streamtrain pack command to resume"
    if next(set_dir.glob("*.tar"), None) is not None:
        return f"{set_dir} has tars but no {FILE_NAME}; index them: streamtrain index --src {set_dir} --out SET"
    return (
        f"{set_dir} is not a shard set: it has no {FILE_NAME}; if it has images, pack them first: "
        f"streamtrain pack --src {set_dir} --out SET"
    )
