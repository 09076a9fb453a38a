"""Statistics of all images of a set, computed by worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shards.errors import ShardError
from shards.format.decode import decode
from shards.format.set_manifest import SetManifest
from shards.format.statistics import Statistics, StatisticsBuilder
from shards.packing.parallel import ordered_map
from shards.progress import bar_size
from shards.reading.shard_set import ShardSet
from shards.storage.store import is_url

# fixed, so that the sums do not depend on the number of workers
_IMAGES_PER_TASK = 256


def store_statistics(set_dir: str, *, workers: int = 1, progress: bool = False) -> SetManifest:
    """Compute the statistics of a local set, write them to its manifest and return it.

    Raises:
        ShardError: the set is remote, damaged, or has no image that can be decoded.
    """
    if is_url(set_dir):
        raise ShardError(f"{set_dir} is a URL; compute the statistics of a local copy and upload its manifest.json")
    shard_set = ShardSet.open(set_dir)
    if shard_set.manifest.faults:
        raise ShardError(f"manifest.json of {set_dir} is damaged; check the set with streamtrain verify")
    manifest = replace(shard_set.manifest, statistics=compute_statistics(shard_set, workers, progress))
    try:
        manifest.save(set_dir)
    except OSError as error:
        raise ShardError(f"{set_dir} cannot be written to ({error.strerror})") from error
    return manifest


def compute_statistics(shard_set: ShardSet, workers: int, progress: bool) -> Statistics:
    """Return the statistics of all images of a local set that can be decoded, in one pass.

    Raises:
        ShardError: the set cannot be read, or has no image that can be decoded.
    """
    tasks = list(_tasks(shard_set))
    total = StatisticsBuilder(shard_set.pixels)
    work = ordered_map(partial(_measure, shard_set.path, shard_set.manifest), tasks, workers)
    shown = None if progress else True
    for part in tqdm(work, desc="statistics", unit=" tasks", total=len(tasks), disable=shown, **bar_size()):
        total.merge(part)
    if not total.num_images:
        raise ShardError(f"no image of {shard_set.path} can be decoded; check the set with streamtrain verify")
    return total.result()


def _tasks(shard_set: ShardSet) -> Iterator[tuple[int, int, int]]:
    for shard, count in enumerate(shard_set.sizes.tolist()):
        for begin in range(0, count, _IMAGES_PER_TASK):
            yield shard, begin, min(begin + _IMAGES_PER_TASK, count)


def _measure(path: Path, manifest: SetManifest, task: tuple[int, int, int]) -> StatisticsBuilder:
    shard, begin, end = task
    shard_set, found = ShardSet(path, manifest), StatisticsBuilder(manifest.pixels)
    for sample in range(begin, end):
        try:
            found.add(decode(shard_set.read(shard, sample), pixels=manifest.pixels))
        except ShardError:
            continue  # training replaces it too
    return found
