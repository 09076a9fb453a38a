"""Read everything in a shard set and report every fault: tars, indexes, manifest, checksums, and a full decode."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

from shards.errors import SampleError, ShardError
from shards.format import images
from shards.format.files import file_sha256
from shards.format.index import Sample, dali_index, load_index, read_samples
from shards.format.set_manifest import FILE_NAME, Manifest, ShardEntry
from shards.format.tars import is_url
from shards.packing.parallel import ordered_map
from shards.reading.source import ShardSet
from shards.storage.store import Store

_IMAGES_PER_TASK = 64


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a set.

    Attributes:
        place: the file, relative to the set.
        index: the sample's number in its shard; None where a whole file is at fault.
        key: the sample's WebDataset key.
        reason: what is wrong.
    """

    place: str
    reason: str
    index: int | None = None
    key: str = ""

    def __str__(self) -> str:
        sample = "" if self.index is None else f", sample {self.index} (key {self.key!r})"
        return f"{self.place}{sample}: {self.reason}"


@dataclass(frozen=True)
class _Task:
    """A shard's files (begin is None), a range of its images, or all of a shard that must be fetched first."""

    shard: int
    begin: int | None = None
    end: int = 0
    remote: bool = False


def verify(
    location: Path | str,
    *,
    workers: int = 1,
    max_pixels: int = images.DEFAULT_MAX_PIXELS,
    progress: bool = False,
) -> list[Fault]:
    """Every fault of a set, in the order of its shards; an empty list means that all is well.

    Args:
        location: the set's folder, or its URL; shards in a store are fetched to a folder for temporary files.
        workers: decoding processes; 1 decodes in this one.
        max_pixels: images with more pixels are faults.
        progress: show a bar on stderr, where that is a terminal.

    Raises:
        ShardError: there is no set, or its manifest cannot be read, or a store cannot be reached.
    """
    location = str(location)
    manifest = load_manifest(location)
    _open.cache_clear()  # an earlier call may have seen other files
    faults = _strangers(location, manifest)
    tasks = list(_tasks(location, manifest))
    bar = tqdm(
        desc="verifying", unit=" images", total=manifest.num_samples, disable=None if progress else True, smoothing=0.05
    )
    with bar:
        results = ordered_map(partial(_check, location, max_pixels), tasks, workers)
        for task, found in zip(tasks, results, strict=True):
            faults += found
            bar.update(0 if task.begin is None else task.end - task.begin)
    return faults


def load_manifest(location: str) -> Manifest:
    """The manifest of a set at a path or URL; raises as ``Manifest.load``."""
    if not is_url(location):
        return Manifest.load(location)
    store = Store(location)
    return store.load(FILE_NAME, partial(Manifest.parse, path=store.url_of(FILE_NAME)))


def _tasks(location: str, manifest: Manifest) -> Iterator[_Task]:
    for shard, entry in enumerate(manifest.shards):
        if is_url(entry.url or location):
            yield _Task(shard, 0, entry.samples, remote=True)
            continue
        yield _Task(shard)
        for begin in range(0, entry.samples, _IMAGES_PER_TASK):
            yield _Task(shard, begin, min(begin + _IMAGES_PER_TASK, entry.samples))


def _strangers(location: str, manifest: Manifest) -> list[Fault]:
    """Files among the shards that the manifest does not name: plain WebDataset readers would take them in."""
    known = {entry.name for entry in manifest.shards}
    if not is_url(location):
        folder = Path(location) / "shards"
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    elif all(entry.url for entry in manifest.shards):
        found = []
    else:
        found = Store(location).names("shards")
    return [Fault(f"shards/{name}", "the manifest does not name this file") for name in found if name not in known]


def _check(location: str, max_pixels: int, task: _Task) -> list[Fault]:
    shard_set = _open(location)
    with images.tolerant_pillow():
        if task.remote:
            return list(_check_fetched(location, shard_set.manifest.shards[task.shard], max_pixels))
        if task.begin is None:
            return list(_check_files(shard_set, task.shard))
        return list(_check_images(shard_set, task.shard, range(task.begin, task.end), max_pixels))


@lru_cache(maxsize=1)
def _open(location: str) -> ShardSet:
    """The set as a worker reads it, task after task; not ``ShardSet.open``, which stops at the first missing file."""
    return ShardSet(Path(location), load_manifest(location))


def _check_fetched(location: str, entry: ShardEntry, max_pixels: int) -> Iterator[Fault]:
    """Everything about a shard in a store: fetched, and looked at as a set of one shard."""
    stem = entry.name.removesuffix(".tar")
    tar = entry.url or f"{location.rstrip('/')}/shards/{entry.name}"
    with tempfile.TemporaryDirectory(prefix="verify_shards-") as folder:
        copy = Path(folder)
        for name, source in (
            (f"shards/{entry.name}", tar),
            (f"index/{stem}.npy", f"{location.rstrip('/')}/index/{stem}.npy"),
            (f"index/{stem}.idx", f"{location.rstrip('/')}/index/{stem}.idx"),
        ):
            (copy / name).parent.mkdir(exist_ok=True)
            if not _fetch(source, copy / name) and source == tar:
                yield Fault(name, f"{tar} does not exist")
                return
        fetched = ShardSet(copy, Manifest((replace(entry, url=""),)))
        yield from _check_files(fetched, 0)
        yield from _check_images(fetched, 0, range(entry.samples), max_pixels)


def _fetch(source: str, target: Path) -> bool:
    """Whether there is such a file, which then is at ``target``."""
    if not is_url(source):
        if Path(source).is_file():
            shutil.copyfile(source, target)
        return target.exists()
    folder, _, name = source.rpartition("/")
    store = Store(folder)
    try:
        store.download(name, target, store.size(name))
    except ShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    return True


def _check_files(shard_set: ShardSet, shard: int) -> Iterator[Fault]:
    """The tar's length, checksum and structure, and whether both indexes agree with it."""
    entry = shard_set.manifest.shards[shard]
    tar, index = shard_set.tar_path(shard), shard_set.index_path(shard)
    place, index_place = f"shards/{entry.name}", f"index/{index.name}"
    try:
        num_bytes = tar.stat().st_size
        if num_bytes != entry.bytes:
            yield Fault(place, f"has {num_bytes} bytes, the manifest says {entry.bytes}")
        if file_sha256(tar) != entry.sha256:
            yield Fault(place, "its SHA-256 differs from the manifest's")
        with open(tar, "rb") as archive:
            samples = tuple(sample for sample in read_samples(archive, place) if sample.image is not None)
    except OSError as error:
        yield Fault(place, f"cannot be read ({error.strerror})")
        return
    except ShardError as error:
        yield Fault(place, str(error))
        return
    if len(samples) != entry.samples:
        yield Fault(place, f"holds {len(samples)} images, the manifest says {entry.samples}")
    yield from _check_index(index, index_place, samples)
    yield from _check_dali_index(index.with_suffix(".idx"), f"index/{index.stem}.idx", samples)


def _check_index(path: Path, place: str, samples: tuple[Sample, ...]) -> Iterator[Fault]:
    try:
        records = load_index(path)
    except ShardError as error:
        yield Fault(place, str(error))
        return
    if len(records) != len(samples):
        yield Fault(place, f"holds {len(records)} samples, the tar {len(samples)}")
        return
    for number, (record, sample) in enumerate(zip(records, samples, strict=True)):
        assert sample.image is not None
        if (int(record["offset"]), int(record["length"])) != (sample.image.offset, sample.image.length):
            yield Fault(place, "does not say where the image lies in the tar", number, sample.key)


def _check_dali_index(path: Path, place: str, samples: tuple[Sample, ...]) -> Iterator[Fault]:
    try:
        expected = dali_index(samples)
    except ShardError:
        return  # names that DALI's index cannot hold: there is none
    try:
        stored = path.read_bytes()
    except OSError as error:
        yield Fault(place, f"cannot be read ({error})")
        return
    if stored != expected:
        yield Fault(place, "disagrees with the tar")


def _check_images(shard_set: ShardSet, shard: int, numbers: range, max_pixels: int) -> Iterator[Fault]:
    """Each image's checksum, size and full decode."""
    place = f"shards/{shard_set.manifest.shards[shard].name}"
    try:
        records = shard_set.records(shard)
    except ShardError:
        return  # no tar or no index, which the check of the files reports once
    for number in numbers:
        try:
            image = images.prepare(shard_set.read(shard, number), max_pixels=max_pixels)
        except SampleError as error:
            yield Fault(place, error.reason, number, error.key)
        except ShardError as error:
            yield Fault(place, str(error), number, shard_set.key(shard, number))
        else:
            if (image.width, image.height) != (int(records[number]["width"]), int(records[number]["height"])):
                yield Fault(place, "the index has another width or height", number, shard_set.key(shard, number))
