"""Statistics of all images of a set, computed by worker processes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shards.errors import SampleError, ShardError, explain_os_error
from shards.format.decode import DEFAULT_MAX_PIXELS, decode
from shards.format.imagery import require_extra
from shards.format.set_manifest import FILE_NAME, SetManifest
from shards.format.statistics import Statistics, StatisticsBuilder
from shards.format.windows import open_oversized
from shards.packing.fetch import fetched_shard, tar_location
from shards.packing.parallel import ordered_map
from shards.progress import bar_size
from shards.reading.shard_set import ShardSet
from shards.storage.store import BULK_POLICY, Store, is_url

_IMAGES_PER_TASK = 256


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics of a set; ``fault`` is why they could not be written to its manifest, empty if they were."""

    manifest: SetManifest
    statistics: Statistics
    fault: str = ""


def store_statistics(location: str, *, workers: int = 1, progress: bool = False) -> StoredStatistics:
    """Compute the statistics of a set and write them to its manifest, if that is possible.

    Args:
        location: folder or URL of the set; each worker fetches remote shards one by one to a temporary folder.

    Raises:
        ShardError: the set is missing or damaged, cannot be read, or has no image that can be decoded.
    """
    manifest = ShardSet.open(location).manifest
    if manifest.faults:
        raise ShardError(f"manifest.json of {location} is damaged; check the set with streamtrain verify")
    if not any(entry.samples for entry in manifest.shards):
        raise ShardError(f"{location} has no images; pack a set of images")
    statistics = result_of(measure(location, manifest, workers, progress), location)
    manifest = replace(manifest, statistics=statistics)
    try:
        _save(manifest, location)
    except OSError as error:
        return StoredStatistics(manifest, statistics, f"{location} cannot be written to ({explain_os_error(error)})")
    except ShardError as error:
        return StoredStatistics(manifest, statistics, str(error).removesuffix("; fix that and re-run to resume"))
    return StoredStatistics(manifest, statistics)


def _save(manifest: SetManifest, location: str) -> None:
    if not is_url(location):
        return manifest.save(location)
    if location.startswith(("http://", "https://")):
        raise ShardError(f"{location} is read-only")
    with tempfile.TemporaryDirectory(prefix="streamtrain-manifest-") as folder:
        manifest.save(folder)
        Store(location, BULK_POLICY).upload(Path(folder) / FILE_NAME, FILE_NAME)


def measure(location: Path | str, manifest: SetManifest, workers: int, progress: bool) -> StatisticsBuilder:
    """Return the statistics of all images of a set that can be decoded, in one pass.

    Args:
        manifest: of the set, or of some of its shards.

    Raises:
        ShardError: the set cannot be read.
    """
    if not manifest.pixels.is_rgb:
        require_extra()
    tasks = list(_tasks(str(location), manifest))
    total = StatisticsBuilder(manifest.pixels)
    work = ordered_map(partial(_measure, str(location), manifest), tasks, workers)
    shown = None if progress else True
    for part in tqdm(work, desc="statistics", unit=" tasks", total=len(tasks), disable=shown, **bar_size()):
        total.merge(part)
    return total


def result_of(total: StatisticsBuilder, location: str) -> Statistics:
    """Return the statistics of a set; raises ShardError if no image could be decoded."""
    if not total.num_images:
        raise ShardError(f"no image of {location} can be decoded; check the set with streamtrain verify")
    return total.result()


def _tasks(location: str, manifest: SetManifest) -> Iterator[tuple[int, int, int]]:
    """Yield shard, first and last image + 1 of each task: whole shards of a store, parts of local ones."""
    for shard, entry in enumerate(manifest.shards):
        step = entry.samples if is_url(tar_location(location, manifest, shard)) else _IMAGES_PER_TASK
        for begin in range(0, entry.samples, step):
            yield shard, begin, min(begin + step, entry.samples)


def _measure(location: str, manifest: SetManifest, task: tuple[int, int, int]) -> StatisticsBuilder:
    shard, begin, end = task
    found = StatisticsBuilder(manifest.pixels)
    is_remote = is_url(tar_location(location, manifest, shard))
    local = ShardSet(Path(location), manifest)
    with fetched_shard(location, manifest, shard) if is_remote else nullcontext(local) as shard_set:
        number = 0 if is_remote else shard
        if not shard_set.tar_path(number).exists():
            raise ShardError(f"{tar_location(location, manifest, shard)} does not exist; copy or pack the set again")
        for sample in range(begin, end):
            try:
                payload = shard_set.read(number, sample)
            except SampleError:
                continue  # training replaces it too
            with suppress(ShardError):  # training replaces it too
                add_image(found, payload)
    return found


def add_image(found: StatisticsBuilder, payload: bytes) -> None:
    """Add an encoded image; one that is too large to be decoded whole is decoded part by part.

    Raises:
        ShardError: it cannot be decoded; nothing is added.
    """
    large = open_oversized(payload, found.pixels, DEFAULT_MAX_PIXELS)
    if large is None:
        found.add(decode(payload, pixels=found.pixels))
        return
    parts = StatisticsBuilder(found.pixels)  # apart, because an image with a damaged part does not count
    for values in large.parts():
        parts.add(values)
    parts.num_images = 1
    found.merge(parts)
