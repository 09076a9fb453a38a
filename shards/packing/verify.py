"""Full verification of a shard set: tars, indexes, manifest, checksums, and a decode of every image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards.errors import SampleError, ShardError, explain_os_error, is_source_failure
from shards.format import images
from shards.format.files import file_sha256
from shards.format.imagery import require_extra
from shards.format.index import make_dali_index
from shards.format.label_maps import MAP_KINDS, MapKind
from shards.format.pixels import PixelFormat
from shards.format.records import RECORD, UNREADABLE, load_index
from shards.format.set_manifest import FILE_NAME, SetManifest
from shards.format.tar_members import Sample, read_samples
from shards.format.windows import open_oversized
from shards.packing.fetch import fetched_shard, tar_location
from shards.packing.parallel import ordered_map
from shards.progress import bar_size
from shards.reading.shard_set import ShardSet
from shards.storage.store import Store, is_url

_IMAGES_PER_TASK = 64


@dataclass(frozen=True)
class Fault:
    """One defect of a set.

    Attributes:
        file: path relative to the set.
        reason: description of the defect.
        index: number of the sample in its shard; None if the defect concerns the whole file.
        key: WebDataset key of the sample.
    """

    file: str
    reason: str
    index: int | None = None
    key: str = ""

    def __str__(self) -> str:
        sample = "" if self.index is None else f", sample {self.index} (key {self.key!r})"
        return f"{self.file}{sample}: {self.reason}"


@dataclass(frozen=True)
class _Task:
    """A shard's files (``begin`` is None), a range of its images, or a whole remote shard."""

    shard: int
    begin: int | None = None
    end: int = 0
    remote: bool = False


@dataclass(frozen=True)
class _Decoder:
    """Decodes an image in full; attributes as the arguments of ``verify``."""

    max_pixels: int
    windows: bool

    def read_size(self, payload: bytes, pixels: PixelFormat) -> tuple[int, int]:
        """Return (width, height) in pixels of an image that can be decoded; raises a ShardError for all others."""
        if self.windows and (image := open_oversized(payload, pixels, self.max_pixels)) is not None:
            for _ in image.parts():
                pass
            return image.width, image.height
        prepared = images.prepare(payload, max_pixels=self.max_pixels, pixels=pixels)
        return prepared.width, prepared.height


def verify(
    location: Path | str,
    *,
    workers: int = 1,
    max_pixels: int = images.DEFAULT_MAX_PIXELS,
    windows: bool = False,
    progress: bool = False,
) -> list[Fault]:
    """Return every fault of a set, in the order of its shards; an empty list means that the set is intact.

    Args:
        location: folder or URL of the set; each worker fetches remote shards one by one to a temporary folder.
        workers: number of decoding processes; 1 decodes in the calling process.
        max_pixels: images with more pixels are faults.
        windows: TIFFs that are too large to be decoded whole are faults only if they cannot be read by windows. All
            their tiles or strips are decoded, one at a time.
        progress: show a progress bar on stderr if it is a terminal.

    Raises:
        ShardError: the set is missing, its manifest cannot be read, or a store cannot be reached.
    """
    location = str(location)
    manifest = SetManifest.load(location)
    if not manifest.pixels.is_rgb:
        require_extra()
    _open.cache_clear()  # the files may have changed since an earlier call
    faults = [Fault(FILE_NAME, reason) for reason in manifest.faults] + _unlisted_files(location, manifest)
    tasks = list(_tasks(location, manifest))
    bar = tqdm(
        desc="verifying", unit=" images", total=manifest.num_samples, disable=None if progress else True,
        smoothing=0.05, **bar_size(),
    )  # fmt: skip
    with bar:
        results = ordered_map(partial(_check, location, _Decoder(max_pixels, windows)), tasks, workers)
        for task, task_faults in zip(tasks, results, strict=True):
            faults += task_faults
            bar.update(0 if task.begin is None else task.end - task.begin)
    return faults


def _tasks(location: str, manifest: SetManifest) -> Iterator[_Task]:
    for shard, entry in enumerate(manifest.shards):
        if is_url(entry.url or location):
            yield _Task(shard, 0, entry.samples, remote=True)
            continue
        yield _Task(shard)
        for begin in range(0, entry.samples, _IMAGES_PER_TASK):
            yield _Task(shard, begin, min(begin + _IMAGES_PER_TASK, entry.samples))


def _unlisted_files(location: str, manifest: SetManifest) -> list[Fault]:
    """Return a fault for each file in shards/ that the manifest does not list: WebDataset readers would read it."""
    listed = {entry.name for entry in manifest.shards}
    if not is_url(location):
        folder = Path(location) / "shards"
        present = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    elif all(entry.url for entry in manifest.shards):
        present = []
    else:
        present = Store(location).list_folder("shards")
    return [Fault(f"shards/{name}", "the manifest does not list this file") for name in present if name not in listed]


def _check(location: str, decoder: _Decoder, task: _Task) -> list[Fault]:
    shard_set = _open(location)
    with images.tolerant_pillow():
        if task.remote:
            return list(_check_remote(location, shard_set.manifest, task.shard, decoder))
        if task.begin is None:
            return list(_check_files(shard_set, task.shard))
        return list(_check_images(shard_set, task.shard, range(task.begin, task.end), decoder))


@lru_cache(maxsize=1)
def _open(location: str) -> ShardSet:
    """Return a set, cached for the tasks of a worker; unlike ``ShardSet.open``, missing files are not an error."""
    return ShardSet(Path(location), SetManifest.load(location))


def _check_remote(location: str, manifest: SetManifest, shard: int, decoder: _Decoder) -> Iterator[Fault]:
    """Fetch a shard from a store and check it as a local set of one shard."""
    with fetched_shard(location, manifest, shard) as fetched:
        if not fetched.tar_path(0).exists():
            yield Fault(f"shards/{fetched.name(0)}", f"{tar_location(location, manifest, shard)} does not exist")
            return
        yield from _check_files(fetched, 0)
        yield from _check_images(fetched, 0, range(manifest.shards[shard].samples), decoder)


def _check_files(shard_set: ShardSet, shard: int) -> Iterator[Fault]:
    """Check the tar's length, checksum and structure, and that both indexes match it."""
    entry = shard_set.manifest.shards[shard]
    tar, index = shard_set.tar_path(shard), shard_set.index_path(shard)
    tar_name, index_name = f"shards/{entry.name}", f"index/{index.name}"
    try:
        num_bytes = tar.stat().st_size
        if num_bytes != entry.bytes:
            yield Fault(tar_name, f"has {num_bytes} bytes, the manifest says {entry.bytes}")
        if file_sha256(tar) != entry.sha256:
            yield Fault(tar_name, "its SHA-256 differs from the manifest's")
        with open(tar, "rb") as archive:
            samples = read_samples(archive, tar_name, pixels=shard_set.pixels)
    except OSError as error:
        if is_source_failure(error):
            raise ShardError(f"{tar} cannot be read ({explain_os_error(error)}); fix that and re-run") from error
        yield Fault(tar_name, f"cannot be read ({explain_os_error(error)})")
        return
    except ShardError as error:
        yield Fault(tar_name, str(error))
        return
    if len(samples) != entry.samples:
        yield Fault(tar_name, f"has {len(samples)} images, the manifest says {entry.samples}")
    yield from _check_index(index, index_name, samples, len(shard_set.manifest.classes))
    yield from _check_dali_index(index.with_suffix(".idx"), f"index/{index.stem}.idx", samples)
    for kind in MAP_KINDS.values():
        yield from _check_maps(shard_set, shard, kind, samples)


def _check_index(path: Path, name: str, samples: tuple[Sample, ...], num_classes: int) -> Iterator[Fault]:
    """Check all fields of the records except checksum and size, which ``_check_images`` checks."""
    try:
        records = load_index(path)
    except ShardError as error:
        yield Fault(name, str(error))
        return
    if len(records) != len(samples):
        yield Fault(name, f"has {len(records)} samples, the tar has {len(samples)}")
        return
    for number, (record, sample) in enumerate(zip(records, samples, strict=True)):
        label = sample.label
        if (int(record["offset"]), int(record["length"])) != (sample.image.offset, sample.image.length):
            yield Fault(name, "has a wrong offset or length for the image", number, sample.key)
        if int(record["label"]) != label:
            yield Fault(name, f"has label {record['label']}, the tar has {label}", number, sample.key)
        elif num_classes and label >= num_classes:
            yield Fault(name, f"has label {label}, the manifest has {num_classes} classes", number, sample.key)
        flags, size = int(record["flags"]), (int(record["width"]), int(record["height"]))
        if flags not in (0, UNREADABLE):
            yield Fault(name, f"has unknown flags {flags:#x}", number, sample.key)
        elif flags == UNREADABLE and size != (0, 0):
            yield Fault(name, f"has a size of {size[0]}x{size[1]} for an unreadable image", number, sample.key)


def _check_maps(shard_set: ShardSet, shard: int, kind: MapKind, samples: tuple[Sample, ...]) -> Iterator[Fault]:
    """Check the records of a shard's maps, and decode each map. Sets of earlier versions have no records of maps."""
    entry, counts = shard_set.manifest.shards[shard], shard_set.manifest.maps.get(kind.name)
    if counts is None:
        return
    name = f"index/{entry.map_index_name(kind.name)}"
    parts = [sample.map_of(kind.name) for sample in samples]
    # an indexed tar may have an empty map, which is not counted
    if (found := sum(part is not None and part.length > 0 for part in parts)) != counts[shard]:
        yield Fault(f"shards/{entry.name}", f"has {found} {kind.title}s, the manifest says {counts[shard]}")
    try:
        index = shard_set.map_index(shard, kind.name)
        records = np.zeros(len(samples), RECORD) if index is None else index.records()
    except ShardError as error:
        yield Fault(name, str(error))
        return
    for number, (part, record, sample) in enumerate(zip(parts, records, samples, strict=False)):
        place = (0, 0) if part is None else (part.offset, part.length)
        if part is not None and not part.length and not record["length"]:
            yield Fault(f"shards/{entry.name}", f"its {kind.title}: the file is empty", number, sample.key)
        elif (int(record["offset"]), int(record["length"])) != place:
            yield Fault(name, f"has a wrong offset or length for the {kind.title}", number, sample.key)
        elif part is not None:
            try:
                image = shard_set.record(shard, number)
                payload = shard_set.read_map(shard, number, record)
                kind.decode_for(payload, int(image["width"]), int(image["height"]))
            except ShardError as error:
                reason = error.reason if isinstance(error, SampleError) else str(error)
                yield Fault(f"shards/{entry.name}", f"its {kind.title}: {reason}", number, sample.key)


def _check_dali_index(path: Path, name: str, samples: tuple[Sample, ...]) -> Iterator[Fault]:
    try:
        expected = make_dali_index(samples)
    except ShardError:
        return  # no index is written for names that DALI cannot read
    try:
        stored = path.read_bytes()
    except OSError as error:
        yield Fault(name, f"cannot be read ({error})")
        return
    if stored != expected:
        yield Fault(name, "does not match the tar")


def _check_images(shard_set: ShardSet, shard: int, numbers: range, decoder: _Decoder) -> Iterator[Fault]:
    """Check each image's checksum and size, and decode it in full."""
    name = f"shards/{shard_set.manifest.shards[shard].name}"
    for number in numbers:
        try:
            record = shard_set.record(shard, number)
        except SampleError:
            continue  # a damaged, missing or unreadable index is reported by _check_files
        except ShardError:
            return
        try:
            payload = shard_set.read(shard, number)
        except SampleError as error:
            yield Fault(name, error.reason, number, error.key)
            continue
        except ShardError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return  # reported by _check_files
            raise
        try:
            size = decoder.read_size(payload, shard_set.pixels)
        except ShardError as error:
            yield Fault(name, str(error), number, shard_set.key(shard, number))
            continue
        if record["flags"] & UNREADABLE:
            yield Fault(name, "has the flag of an unreadable image in the index", number, shard_set.key(shard, number))
        elif size != (int(record["width"]), int(record["height"])):
            yield Fault(name, "the index has another width or height", number, shard_set.key(shard, number))
