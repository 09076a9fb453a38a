"""Make a set of tars that others wrote, where they lie: indexes and a manifest that points to them, and no copy.

Each tar is read once from end to end, for the checksum of every image and of the whole.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shards.errors import ShardError
from shards.format.files import file_sha256, write_whole
from shards.format.index import UNREADABLE, build, dali_index, save_index
from shards.format.set_manifest import FILE_NAME, Manifest, ShardEntry
from shards.format.tars import is_url
from shards.packing.inputs import is_compressed_tar, refuse_zstd
from shards.packing.parallel import ordered_map
from shards.storage.store import Store


@dataclass(frozen=True)
class AdoptReport:
    """What came of indexing."""

    manifest: Manifest
    num_unreadable: int  # images whose header could not be read; a reader replaces them by others
    without_dali: tuple[str, ...]  # tars for which DALI's index cannot be written, each with the reason
    empty: tuple[str, ...]  # tars without any image, which are left out


@dataclass(frozen=True)
class _Adopted:
    entry: ShardEntry
    num_unreadable: int
    dali_refusal: str


def adopt(sources: Sequence[str], out: Path, *, workers: int = 1, progress: bool = False) -> AdoptReport:
    """Index tars in place.

    Args:
        sources: tars, folders of tars or patterns of local tars; tars and folders may be URLs.
        out: the folder of the set; new or empty. It gets indexes and a manifest.
        workers: processes; 1 works in this one.
        progress: show a bar on stderr, where that is a terminal.

    Raises:
        ShardError: no tars, no images, a damaged tar, or a folder that cannot take the set.
    """
    locations = [location for source in sources for location in _tars_of(source)]
    if not locations:
        raise ShardError(f"no .tar files in {', '.join(sources)}")
    with _new_folder(out):
        return _adopt_all(locations, out, workers, progress)


@contextmanager
def _new_folder(out: Path) -> Iterator[None]:
    """The folder of a set in the making; taken away again if nothing comes of it."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ShardError(f"--out {out} is not empty; choose a new folder")
        (out / "index").mkdir()
    except OSError as error:
        raise ShardError(f"--out {out} cannot be written to ({error.strerror}); choose another folder") from error
    try:
        yield
    except BaseException:
        shutil.rmtree(out / "index")
        if made:
            shutil.rmtree(out)
        raise


def _adopt_all(locations: Sequence[str], out: Path, workers: int, progress: bool) -> AdoptReport:
    # Tars of different folders may share a name, so the number goes first.
    tasks = [(location, f"{number:06d}-{location.rpartition('/')[2]}") for number, location in enumerate(locations)]
    work = ordered_map(partial(_adopt_one, out), tasks, workers)
    done = list(tqdm(work, desc="indexing", unit=" tars", total=len(tasks), disable=None if progress else True))
    manifest = Manifest(tuple(one.entry for one in done if one.entry.samples))
    if not manifest.shards:
        raise ShardError(f"no images in {len(locations)} tars, such as {locations[0]}")
    manifest.save(out)
    return AdoptReport(
        manifest,
        sum(one.num_unreadable for one in done),
        tuple(f"{one.entry.url}: {one.dali_refusal}" for one in done if one.dali_refusal),
        tuple(one.entry.url for one in done if not one.entry.samples),
    )


def _tars_of(source: str) -> list[str]:
    """The tars that a source names, as absolute paths or URLs, sorted."""
    if not source.strip():
        raise ShardError("--src is empty; give tars, a folder of tars, a pattern or a URL")
    if is_url(source):
        store = Store(source)  # refuses what cannot be read
        _refuse_compressed(source)
        if source.endswith(".tar"):
            return [source]
        names = store.names("")
        if FILE_NAME in names:
            raise ShardError(f"--src {source} already is a shard set; train from it as it is")
        return [store.url_of(name) for name in names if name.endswith(".tar")]
    path = Path(source)
    if path.is_dir():
        if (path / FILE_NAME).is_file():
            raise ShardError(f"--src {source} already is a shard set; train from it as it is")
        return sorted(str(tar.resolve()) for tar in path.glob("*.tar"))
    found = sorted(str(Path(match).resolve()) for match in glob.glob(source))
    if not found:
        raise ShardError(f"--src {source} does not exist; give tars, a folder of tars, a pattern or a URL")
    for location in found:
        _refuse_compressed(location)
    return found


def _refuse_compressed(location: str) -> None:
    refuse_zstd(location)
    if is_compressed_tar(location):
        raise ShardError(f"--src {location} is compressed, so no image can be read by itself; use streamtrain pack")


def _adopt_one(out: Path, task: tuple[str, str]) -> _Adopted:
    location, name = task
    if not is_url(location):
        return _index_file(Path(location), out, ShardEntry(name, 0, 0, "", location))
    folder, _, tar = location.rpartition("/")
    store = Store(folder)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        copy = Path(scratch) / "copy.tar"
        store.download(tar, copy, store.size(tar))
        return _index_file(copy, out, ShardEntry(name, 0, 0, "", location))


def _index_file(tar: Path, out: Path, entry: ShardEntry) -> _Adopted:
    try:
        with open(tar, "rb") as archive:
            index = build(archive, entry.url)
        entry = replace(entry, bytes=tar.stat().st_size, samples=len(index.records), sha256=file_sha256(tar))
    except OSError as error:
        raise ShardError(f"{entry.url} cannot be read ({error.strerror})") from error
    refusal = ""
    if entry.samples:
        path = out / "index" / entry.index_name
        save_index(index.records, path)
        try:
            write_whole(path.with_suffix(".idx"), dali_index(index.samples))
        except ShardError as error:
            refusal = str(error)
    return _Adopted(entry, int((index.records["flags"] & UNREADABLE != 0).sum()), refusal)
