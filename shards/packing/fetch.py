"""Whole shards of a store, fetched to a temporary folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from shards.errors import ShardError
from shards.format.set_manifest import SetManifest
from shards.reading.shard_set import ShardSet
from shards.storage.store import Store, is_url


def tar_location(location: str, manifest: SetManifest, shard: int) -> str:
    """Return the URL or path of a shard's tar."""
    entry = manifest.shards[shard]
    return entry.url or f"{location.rstrip('/')}/shards/{entry.name}"


@contextmanager
def fetched_shard(location: str, manifest: SetManifest, shard: int) -> Iterator[ShardSet]:
    """Fetch a shard and its indexes, and yield them as a local set of one shard, without the files that do not exist.

    Args:
        location: folder or URL of the set.

    Raises:
        ShardError: a file cannot be fetched or stored.
    """
    entry = manifest.shards[shard]
    stem = entry.name.removesuffix(".tar")
    tar = entry.url.rpartition("/")[::2] if entry.url else (location, f"shards/{entry.name}")
    with tempfile.TemporaryDirectory(prefix="streamtrain-shard-") as folder:
        copy = Path(folder)
        for name in ("shards", "index"):
            (copy / name).mkdir()
        if _fetch(*tar, copy / "shards" / entry.name):
            maps = [f"index/{entry.map_index_name(kind)}" for kind, counts in manifest.maps.items() if counts[shard]]
            for name in (f"index/{stem}.npy", f"index/{stem}.idx", *maps):
                _fetch(location, name, copy / name)
        counts_here = {kind: (counts[shard],) for kind, counts in manifest.maps.items()}
        yield ShardSet(copy, replace(manifest, shards=(replace(entry, url=""),), maps=counts_here))


def _fetch(folder: str, name: str, target: Path) -> bool:
    """Copy a file of a folder or URL, and return whether it exists."""
    if not is_url(folder):
        source = Path(folder) / name
        if source.is_file():
            shutil.copyfile(source, target)
        return target.exists()
    try:
        Store(folder).copy(name, target)
    except ShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False
        raise
    return True
