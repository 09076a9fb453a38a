"""Images into a shard set: decoded in full by worker processes, written by one, resumed after a kill.

The set's bytes depend on the source and the options only, not on the number of workers nor on how often packing was
interrupted. While it goes on, ``packing.jsonl`` in the set's folder says which shards are complete; ``manifest.json``,
without which no reader takes the set, comes last. A set for a URL is packed in a local folder, which each shard leaves
once it is sent.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from shards.errors import ShardError
from shards.format import images
from shards.format.files import partial_path, remove_partials, write_whole
from shards.format.items import Inputs, Item, SourceUnreachable, sample_key
from shards.format.set_manifest import FILE_NAME, JOURNAL_NAME, Manifest, ShardEntry
from shards.format.tars import is_url
from shards.packing.inputs import list_inputs, needs_unpacking, unpack
from shards.packing.parallel import ordered_map
from shards.packing.parquet import Columns
from shards.packing.shard_writer import ShardWriter
from shards.packing.upload import NOTE_NAME, REJECTED_NAME, Upload

_FORMAT = 1  # of the shards; part of a packing's fingerprint
_LOCK = "packing.lock"
_UNPACKED = "packing.tar"
_ITEMS_PER_TASK = 16
_OURS = {"shards", "index", FILE_NAME, REJECTED_NAME, JOURNAL_NAME, NOTE_NAME, _LOCK, _UNPACKED}


@dataclass(frozen=True)
class PackOptions:
    """What decides the bytes of a set beside its source."""

    shard_bytes: int = 256_000_000  # a shard is closed before it would grow beyond this
    max_side: int | None = None  # shrink larger images to this many pixels
    quality: int = images.DEFAULT_QUALITY  # of the JPEGs that are made anew
    max_pixels: int = images.DEFAULT_MAX_PIXELS  # refuse larger images
    upright: bool = False  # turn images with an EXIF rotation, instead of leaving that to the decoder
    shuffle: int | None = None  # a seed: pack in random order
    dedup: bool = False  # leave out images whose bytes were packed before


@dataclass(frozen=True)
class PackReport:
    """What came of a packing."""

    manifest: Manifest
    num_rejected: int | None  # listed in rejected.jsonl; None where that was taken away since
    num_ignored: int  # files that are no images


@dataclass
class _Done:
    """How far a packing has come; each line of the journal adds to it."""

    shards: list[ShardEntry] = field(default_factory=list)
    next_position: int = 0  # of the first item that is in no complete shard
    rejected: list[dict[str, str]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # content hashes, where duplicates are left out

    def add(self, later: _Done) -> None:
        """Take in what came next."""
        self.shards += later.shards
        self.next_position = later.next_position
        self.rejected += later.rejected
        self.seen |= later.seen


@dataclass(frozen=True)
class _Outcome:
    """What a worker says about an item: an image, or why there is none."""

    image: images.Prepared | None
    reason: str
    content: str  # hash of the source's bytes


def pack(
    src: Path | str,
    out: Path | str,
    options: PackOptions,
    *,
    columns: Columns | None = None,
    workers: int = 1,
    progress: bool = False,
    scratch: Path | None = None,
) -> PackReport:
    """Pack the images of a folder, a list file, a tar or parquet files into a shard set.

    Packing the same again into a finished set changes nothing; into one that was interrupted, it goes on.

    Args:
        src: a path or URL; see ``shards.packing.inputs``.
        out: the set's folder or its URL; new, empty, or of the same packing.
        columns: of parquet files.
        workers: decoding processes; 1 decodes in this one.
        progress: show a bar on stderr, where that is a terminal.
        scratch: where a set for a URL is packed; None: a folder for temporary files, by the URL's name.

    Raises:
        ShardError: nothing to pack, nothing that decodes, or a folder that cannot take it; says what to do.
    """
    src, upload, folder = str(src), None, Path(out)
    if is_url(str(out)):
        folder = scratch or scratch_folder(str(out))
        upload = Upload(str(out), folder)
    packing = partial(
        _pack, src=src, out=folder, options=options, workers=workers, bar=progress, upload=upload
    )
    option = "--scratch" if upload else "--out"
    if not needs_unpacking(src) or not (is_url(src) or Path(src).is_file()):
        inputs = list_inputs(src, columns)  # before anything is made
        with _claimed(folder, option):
            return packing(inputs)
    with _claimed(folder, option):
        plain = folder / _UNPACKED
        try:
            unpack(src, plain)
            return packing(list_inputs(str(plain)))
        finally:
            plain.unlink(missing_ok=True)


def scratch_folder(url: str) -> Path:
    """Where a set for a URL is packed by default: the same at every attempt, so that each goes on with the last."""
    owner = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"make_shards-{owner}-{blake2b(url.encode(), digest_size=8).hexdigest()}"


@contextmanager
def _claimed(out: Path, option: str) -> Iterator[None]:
    """Hold a set's folder for one packing; make it if need be, and take it away again if nothing is left in it."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        ours = {*_OURS, *(partial_path(out / name).name for name in _OURS)}
        foreign = sorted({entry.name for entry in out.iterdir()} - ours)
        if not any((out / name).exists() for name in (FILE_NAME, JOURNAL_NAME, NOTE_NAME)):
            # nothing says that these folders are of ours, which would be replaced
            foreign += sorted(
                str(entry.relative_to(out)) for name in ("shards", "index") for entry in (out / name).glob("*")
            )
        if foreign:
            raise ShardError(f"{option} {out} holds other files, such as {foreign[0]}; choose a new folder")
        lock = filelock.FileLock(out / _LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise ShardError(
            f"another make_shards is packing into {out}; wait for it or choose another {option}"
        ) from error
    except OSError as error:
        raise ShardError(f"{option} {out} cannot be written to ({error.strerror}); choose another folder") from error
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"writing to {out} failed ({error.strerror}); mend that and run this again to go on"
        ) from error
    finally:
        (out / _LOCK).unlink(missing_ok=True)
        lock.release()
        if (made or option == "--scratch") and not any(out.iterdir()):
            out.rmdir()


def _pack(
    inputs: Inputs,
    src: str,
    out: Path,
    options: PackOptions,
    workers: int,
    bar: bool,
    upload: Upload | None,
) -> PackReport:
    fingerprint = inputs.fingerprint(json.dumps([_FORMAT, inputs.classes, asdict(options)]))
    there = upload.finished(fingerprint) if upload else _finished(out, fingerprint)
    if there is not None:
        (out / JOURNAL_NAME).unlink(missing_ok=True)
        if upload:
            _remove_unfinished(out)
        return PackReport(*there, inputs.num_ignored)
    done = _open_journal(out, fingerprint, shards_stay=upload is None)
    if upload:
        try:
            upload.begin(fingerprint, done.shards)
        except ShardError:
            if not done.shards:
                _remove_unfinished(out)
            raise
    (out / "shards").mkdir(exist_ok=True)
    (out / "index").mkdir(exist_ok=True)
    for folder in (out, out / "shards", out / "index"):
        remove_partials(folder)
    # an image's number in the source makes its key, whatever the order
    _write_shards(inputs.items, inputs.order(options.shuffle), out, options, done, workers, bar, upload)
    if not done.shards:
        _remove_unfinished(out)
        first = done.rejected[0]
        raise ShardError(
            f"none of the {len(inputs.items)} images in {src} can be used; "
            f"the first: {first['path']}: {first['reason']}"
        )
    lines = "".join(json.dumps(rejection) + "\n" for rejection in done.rejected)
    write_whole(out / REJECTED_NAME, lines.encode())
    manifest = Manifest(tuple(done.shards), inputs.classes, fingerprint)
    if upload:
        upload.finish(manifest)
        _remove_unfinished(out)
    else:
        manifest.save(out)
        (out / JOURNAL_NAME).unlink()
    return PackReport(manifest, len(done.rejected), inputs.num_ignored)


def _finished(out: Path, fingerprint: str) -> tuple[Manifest, int | None] | None:
    """The set in a folder and how many images it rejected, if it is finished and the very one that was asked for."""
    if not (out / FILE_NAME).exists():
        return None
    manifest = Manifest.load(out)
    if manifest.fingerprint != fingerprint:
        raise ShardError(f"--out {out} already holds another shard set; choose a new folder, or delete that one")
    log = out / REJECTED_NAME
    return manifest, len(log.read_bytes().splitlines()) if log.exists() else None


def _write_shards(
    items: Sequence[Item],
    numbers: np.ndarray,
    out: Path,
    options: PackOptions,
    done: _Done,
    workers: int,
    bar: bool,
    upload: Upload | None,
) -> None:
    """Pack the items that are in no complete shard yet, in the order of ``numbers``; note each shard in ``done``."""
    writer: ShardWriter | None = None
    since = _Done()  # what came after the latest complete shard
    left = numbers[done.next_position :].tolist()
    outcomes = _outcomes([items[number] for number in left], options, workers)
    shown = tqdm(
        outcomes,
        desc="packing",
        unit=" images",
        total=len(numbers),
        initial=done.next_position,
        disable=None if bar else True,
        smoothing=0.05,
    )
    try:
        for position, (number, outcome) in enumerate(zip(left, shown, strict=True), start=done.next_position):
            image, reason, label = outcome.image, outcome.reason, items[number].label
            if options.dedup and (outcome.content in done.seen or outcome.content in since.seen):
                image, reason = None, "the same bytes as an image before it"
            if image is None:
                since.rejected.append({"path": items[number].name, "reason": reason})
                continue
            if writer and writer.num_bytes + ShardWriter.bytes_for(image, label) > options.shard_bytes:
                _close_shard(out, writer, position, since, done, upload)
                writer, since = None, _Done()
            writer = writer or ShardWriter(out, len(done.shards))
            if options.dedup:
                since.seen.add(outcome.content)
            writer.add(sample_key(number, items[number].name), image, label)
        if writer:
            _close_shard(out, writer, len(numbers), since, done, upload)
            writer = None
        else:
            done.rejected += since.rejected
    finally:
        outcomes.close()
        if writer:
            writer.discard()


def _close_shard(
    out: Path, writer: ShardWriter, position: int, since: _Done, done: _Done, upload: Upload | None
) -> None:
    """Finish a shard and note it in the journal: from here on it is never packed again."""
    since.shards, since.next_position = [writer.finish()], position
    if upload:
        upload.shard(since.shards[0])
    line = json.dumps(
        {
            "shard": asdict(since.shards[0]),
            "next_position": position,
            "rejected": since.rejected,
            "seen": sorted(since.seen),
        }
    )
    _append_durably(out / JOURNAL_NAME, line)
    done.add(since)


def _open_journal(out: Path, fingerprint: str, shards_stay: bool) -> _Done:
    """What an interrupted packing of the same has done; starts a journal where there is none.

    Args:
        shards_stay: complete shards must still be there; what comes from the first that is not is packed again.

    Raises:
        ShardError: the folder holds an interrupted packing of something else.
    """
    path = out / JOURNAL_NAME
    done = _Done()
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if not lines:
        write_whole(path, (json.dumps({"fingerprint": fingerprint}) + "\n").encode())
        return done
    if _of_another(lines[0], fingerprint):
        raise ShardError(
            f"--out {out} holds an interrupted packing of another source or with other options; delete it or choose "
            "a new folder"
        )
    whole = [lines[0]]
    for line in lines[1:]:
        try:
            entry = json.loads(line)
            shard = ShardEntry(**entry["shard"])
            part = _Done([shard], entry["next_position"], entry["rejected"], set(entry["seen"]))
        except (ValueError, TypeError, KeyError):
            break  # torn by the kill
        if shards_stay and not _is_there(out, shard):
            break
        whole.append(line)
        done.add(part)
    write_whole(path, ("\n".join(whole) + "\n").encode())
    return done


def _of_another(first_line: str, fingerprint: str) -> bool:
    """Whether a journal that begins so is not the one of this packing."""
    try:
        return bool(json.loads(first_line)["fingerprint"] != fingerprint)
    except (ValueError, TypeError, KeyError):
        return True


def _is_there(out: Path, shard: ShardEntry) -> bool:
    """Whether a complete shard still has its length and its indexes."""
    tar, records = out / "shards" / shard.name, out / "index" / shard.index_name
    try:
        return tar.stat().st_size == shard.bytes and records.is_file() and records.with_suffix(".idx").is_file()
    except OSError:
        return False


def _append_durably(path: Path, line: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _remove_unfinished(out: Path) -> None:
    for name in ("shards", "index"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (JOURNAL_NAME, NOTE_NAME, REJECTED_NAME, FILE_NAME):
        (out / name).unlink(missing_ok=True)


def _outcomes(items: Sequence[Item], options: PackOptions, workers: int) -> Generator[_Outcome, None, None]:
    """What becomes of each item, in order."""
    tasks = (items[first : first + _ITEMS_PER_TASK] for first in range(0, len(items), _ITEMS_PER_TASK))
    with closing(ordered_map(partial(_prepare, options), tasks, workers)) as results:
        for outcomes in results:
            yield from outcomes


def _prepare(options: PackOptions, items: Sequence[Item]) -> list[_Outcome]:
    with images.tolerant_pillow():
        return [_prepare_one(item, options) for item in items]


def _prepare_one(item: Item, options: PackOptions) -> _Outcome:
    content = ""
    try:
        payload = item.place.read()
        if options.dedup:
            content = blake2b(payload, digest_size=16).hexdigest()
        image = images.prepare(
            payload,
            max_side=options.max_side,
            max_pixels=options.max_pixels,
            quality=options.quality,
            upright=options.upright,
        )
    except SourceUnreachable:
        raise
    except ShardError as error:
        return _Outcome(None, str(error), content)
    return _Outcome(image, "", content)
