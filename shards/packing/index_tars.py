"""Indexing existing tars in place: a shard set of indexes and a manifest that points to the tars, without copies.

Each tar is read once in full, for its checksum and that of every image.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from shards.credentials import split_query, strip_credentials
from shards.errors import ShardError, explain_os_error
from shards.format.decode import DEFAULT_MAX_PIXELS, decode
from shards.format.files import file_sha256, write_whole
from shards.format.imagery import require_extra
from shards.format.index import build_index, make_dali_index
from shards.format.pixels import RGB, PixelFormat
from shards.format.records import UNREADABLE, save_index
from shards.format.set_manifest import FILE_NAME, SetManifest, ShardEntry, counted
from shards.format.tally import Tally
from shards.format.windows import open_oversized
from shards.packing.inputs import is_compressed_tar, refuse_zstd
from shards.packing.parallel import ordered_map
from shards.packing.summary import spread
from shards.progress import bar_size
from shards.reading.shard_set import ShardSet
from shards.storage.store import Store, is_url

_NUM_TRIED = 16


@dataclass(frozen=True)
class IndexReport:
    """Result of indexing.

    Attributes:
        num_unreadable: images whose header could not be read; readers replace them.
        without_dali: tars for which DALI's index cannot be written, each with the reason.
        empty: tars without images, which are omitted.
        passed_over: members that belong to no sample, and labels without an image, by kind.
    """

    manifest: SetManifest
    num_unreadable: int
    without_dali: tuple[str, ...]
    empty: tuple[str, ...]
    passed_over: Tally = field(default_factory=Tally)


@dataclass(frozen=True)
class _IndexedTar:
    entry: ShardEntry
    num_unreadable: int
    dali_error: str
    passed_over: Tally
    num_maps: dict[str, int]  # by kind


def index_tars(
    sources: Sequence[str], out: Path | str, *, workers: int = 1, progress: bool = False, pixels: PixelFormat = RGB
) -> IndexReport:
    """Make a shard set of existing WebDataset tars, which stay where they are.

    A sample's image is its first member with an image extension, its label the integer in the ``.cls`` member of the
    same name, and its maps have the same name too; see ``tar_members``.

    Args:
        sources: tars, folders of tars, or patterns of local tars; tars and folders may be URLs.
        out: folder of the set, new or empty; receives the indexes and the manifest.
        workers: number of processes; 1 uses the calling process.
        progress: show a progress bar on stderr if it is a terminal.
        pixels: of all images; images of another kind fail to decode later, which ``verify`` reports. A few are tried.

    Raises:
        ShardError: there are no tars or no images, none of the images tried has ``pixels``, a tar is damaged, or the
            folder cannot hold the set.
    """
    out = Path(out)
    if not pixels.is_rgb:
        require_extra()
    locations = [location for source in sources for location in _tars_of(source)]
    if not locations:
        raise ShardError(f"no .tar files in {', '.join(sources)}")
    with _new_folder(out):
        return _index_all(locations, out, workers, progress, pixels)


@contextmanager
def _new_folder(out: Path) -> Iterator[None]:
    """Create the folder of a set; remove it again if indexing fails."""
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ShardError(f"--out {out} is not empty; choose a new folder")
        (out / "index").mkdir()
    except OSError as error:
        raise ShardError(f"--out {out} cannot be written to ({error.strerror}); choose another folder") from error
    try:
        yield
    except BaseException as error:
        shutil.rmtree(out / "index", ignore_errors=True)
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, OSError):
            raise ShardError(
                f"writing to {out} failed ({explain_os_error(error)}); fix that and run it again"
            ) from error
        raise


def _index_all(locations: Sequence[str], out: Path, workers: int, progress: bool, pixels: PixelFormat) -> IndexReport:
    # tars of different folders may have the same name, so a number is prepended
    tasks = [(location, f"{number:06d}-{location.rpartition('/')[2]}") for number, location in enumerate(locations)]
    work = ordered_map(partial(_index_one, out, pixels), tasks, workers)
    shown = None if progress else True
    done = list(tqdm(work, desc="indexing", unit=" tars", total=len(tasks), disable=shown, **bar_size()))
    used = [one for one in done if one.entry.samples]
    kinds = dict.fromkeys(kind for one in used for kind in one.num_maps)
    maps = {kind: tuple(one.num_maps.get(kind, 0) for one in used) for kind in kinds}
    manifest = SetManifest(tuple(one.entry for one in used), pixels=pixels, maps=maps)
    passed_over = Tally()
    for one in done:
        passed_over.merge(one.passed_over)
    if not manifest.shards:
        raise ShardError(
            f"no images in {counted(len(locations), 'tar')}, such as {locations[0]}{passed_over.clauses()}"
        )
    _check_pixels(ShardSet(out, manifest))
    manifest.save(out)
    return IndexReport(
        manifest,
        sum(one.num_unreadable for one in done),
        tuple(f"{one.entry.url}: {one.dali_error}" for one in done if one.dali_error),
        tuple(one.entry.url for one in done if not one.entry.samples),
        passed_over,
    )


def _check_pixels(shard_set: ShardSet) -> None:
    """Raise a ShardError if none of the images that are tried can be decoded with the set's pixels."""
    reasons = []
    for shard, sample in spread(shard_set, _NUM_TRIED):
        payload = shard_set.read(shard, sample)
        try:
            image = open_oversized(payload, shard_set.pixels, DEFAULT_MAX_PIXELS)
            if image is None:
                decode(payload, pixels=shard_set.pixels)
            else:
                next(image.parts())  # training reads it by windows
            return
        except ShardError as error:
            reasons.append(f"{shard_set.key(shard, sample)}: {error}")
    raise ShardError(
        f"none of the {counted(len(reasons), 'image')} tried can be decoded as {shard_set.pixels}; the first: "
        f"{reasons[0]}; check --channels and --dtype"
    )


def _tars_of(source: str) -> list[str]:
    """Return the tars of a source as absolute paths or URLs, sorted."""
    if not source.strip():
        raise ShardError("--src is empty; give tars, a folder of tars, a pattern or a URL")
    if is_url(source):
        store = Store(source)  # raises for unsupported URLs
        if split_query(source)[1]:
            raise ShardError(f"--src {source} has a query, which is never stored; give a URL that can be read without")
        _refuse_compressed(source)
        if source.endswith(".tar"):
            return [source]
        names = store.list_folder("")
        if FILE_NAME in names:
            raise ShardError(f"--src {source} already is a shard set; train from it as it is")
        return [f"{source.rstrip('/')}/{name}" for name in names if name.endswith(".tar")]
    path = Path(source)
    if path.is_dir():
        if (path / FILE_NAME).is_file():
            raise ShardError(f"--src {source} already is a shard set; train from it as it is")
        return sorted(str(tar.resolve()) for tar in path.glob("*.tar"))
    locations = sorted(str(Path(match).resolve()) for match in glob.glob(source))
    if not locations:
        raise ShardError(f"--src {source} does not exist; give tars, a folder of tars, a pattern or a URL")
    for location in locations:
        _refuse_compressed(location)
    return locations


def _refuse_compressed(location: str) -> None:
    refuse_zstd(location)
    if is_compressed_tar(location):
        raise ShardError(f"--src {location} is compressed, so single images cannot be read; use streamtrain pack")


def _index_one(out: Path, pixels: PixelFormat, task: tuple[str, str]) -> _IndexedTar:
    location, name = task
    if not is_url(location):
        return _index_file(Path(location), out, ShardEntry(name, 0, 0, "", location), pixels)
    folder, _, tar = location.rpartition("/")
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        copy = Path(scratch) / "copy.tar"
        Store(folder).copy(tar, copy)
        return _index_file(copy, out, ShardEntry(name, 0, 0, "", strip_credentials(location)), pixels)


def _index_file(tar: Path, out: Path, entry: ShardEntry, pixels: PixelFormat) -> _IndexedTar:
    passed_over = Tally()
    try:
        with open(tar, "rb") as archive:
            index = build_index(archive, entry.url, passed_over, pixels)
        entry = replace(entry, bytes=tar.stat().st_size, samples=len(index.records), sha256=file_sha256(tar))
    except OSError as error:
        raise ShardError(f"{entry.url} cannot be read ({explain_os_error(error)})") from error
    dali_error = ""
    if entry.samples:
        path = out / "index" / entry.index_name
        save_index(index.records, path)
        for kind, records in index.maps.items():
            save_index(records, path.with_name(entry.map_index_name(kind)))
        try:
            write_whole(path.with_suffix(".idx"), make_dali_index(index.samples))
        except ShardError as error:
            dali_error = str(error)
    num_unreadable = int((index.records["flags"] & UNREADABLE != 0).sum())
    num_maps = {kind: int((records["length"] > 0).sum()) for kind, records in index.maps.items()}
    return _IndexedTar(entry, num_unreadable, dali_error, passed_over, num_maps)
