"""Packing images into a shard set: decoded in full by worker processes, written by one, resumed after a kill.

The bytes of a set depend only on the source and the options, not on the number of workers or interruptions. During
packing, ``packing.jsonl`` in the set's folder lists the complete shards; ``manifest.json``, without which readers
reject the set, is written last. A set for a URL is packed in a local folder; each shard is deleted once it is sent.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from tqdm import tqdm

from shards.errors import ShardError, explain_os_error
from shards.format import dicom
from shards.format.files import cache_folder, make_private_folder, partial_path, remove_partials, write_whole
from shards.format.folder_lock import FolderInUse, lock_folder
from shards.format.imagery import require_extra
from shards.format.images import DEFAULT_QUALITY
from shards.format.set_manifest import FILE_NAME, JOURNAL_NAME, SetManifest
from shards.format.statistics import StatisticsBuilder
from shards.format.tally import Tally
from shards.packing.inputs import list_inputs, needs_unpacking, unpack
from shards.packing.items import Inputs, SourceUnreachable, sample_key
from shards.packing.journal import Progress, find_finished, open_journal, record_shard, remove_unfinished
from shards.packing.maps import check_maps, pair_folders
from shards.packing.options import PackOptions as PackOptions
from shards.packing.parquet import Columns
from shards.packing.prepare import prepare_all
from shards.packing.shard_writer import ShardWriter
from shards.packing.statistics import measure, result_of
from shards.packing.summary import LEFT_OUT, count_reasons
from shards.packing.tiles import SKIPPED_TILES, cut
from shards.packing.upload import MARKER_NAME, REJECTED_NAME, Upload
from shards.progress import bar_size
from shards.storage.store import is_url

_FORMAT = 1  # of the shards; part of a packing's fingerprint
_LOCK = "packing.lock"
_UNPACKED = "packing.tar"
_SET_NAMES = {"shards", "index", FILE_NAME, REJECTED_NAME, JOURNAL_NAME, MARKER_NAME, _LOCK, _UNPACKED}


@dataclass(frozen=True)
class PackReport:
    """Result of a packing.

    Attributes:
        rejected: counts of the images and maps in ``rejected.jsonl`` by reason; None if that file was deleted from a
            finished set.
        passed_over: counts of the files and labels that are not used, by kind.
        is_new: False if the set was already complete.
    """

    manifest: SetManifest
    rejected: Counter[str] | None
    passed_over: Tally
    is_new: bool = True

    @property
    def num_rejected(self) -> int | None:
        """Number of images that are not in the set."""
        if self.rejected is None:
            return None
        return sum(count for reason, count in self.rejected.items() if not reason.startswith(LEFT_OUT))

    @property
    def num_ignored(self) -> int:
        """Number of files that are not images."""
        return self.passed_over.num_files


def pack(
    src: Path | str,
    out: Path | str,
    options: PackOptions | None = None,
    *,
    columns: Columns | None = None,
    workers: int = 1,
    progress: bool = False,
    scratch: Path | None = None,
    on_listed: Callable[[Inputs], object] | None = None,
) -> PackReport:
    """Pack the images of a folder, a list file, a tar or Parquet files into a shard set, with their maps.

    Every image is decoded in full; an unusable one is left out and listed in ``rejected.jsonl`` of the set. A map that
    is unusable, or has another shape than its image, is listed there too, and its image packed without it. A second
    call with the same arguments resumes an interrupted packing, and changes nothing in a finished set.

    Args:
        src: path or URL of the images; see ``shards.packing.inputs``.
        out: folder or URL of the set; new, empty, or of the same packing.
        options: size, shrinking, order and rejection; None for the defaults.
        columns: columns of Parquet files.
        workers: number of decoding processes; 1 decodes in the calling process.
        progress: show a progress bar on stderr if it is a terminal.
        scratch: folder of this user in which a set for a URL is packed; None for ``scratch_folder``.
        on_listed: called with the images and labels that were found, before any is packed.

    Raises:
        ShardError: there are no images or none can be used, the source cannot be read, or the folder or URL cannot
            hold the set; the message gives the remedy.
    """
    src, upload, folder, options = str(src), None, Path(out), options or PackOptions()
    if options.tiles or not options.pixels.is_rgb:
        require_extra()
    if options.tiles:
        options.tiles.check(options.pixels)
        if options.max_side is not None or options.upright:
            raise ShardError("--tiles keeps all pixels and stores them upright; remove --max-side and --orientation")
    if not options.pixels.is_rgb and (options.max_side is not None or options.upright):
        raise ShardError(f"--max-side and --orientation apply write 8-bit RGB JPEGs, not {options.pixels}; remove them")
    if options.tiles and options.map_folders:
        raise ShardError("--tiles cuts images but not their maps; remove --tiles, or --seg and --depth")
    if options.quality != DEFAULT_QUALITY and (options.tiles or not options.pixels.is_rgb):
        raise ShardError(
            "--quality applies to re-encoded JPEGs, not to tiles or to other pixels than 8-bit RGB; remove it"
        )
    if is_url(str(out)):
        folder = scratch or scratch_folder(str(out))
        upload = Upload(str(out), folder)
    packing = _Packing(src, folder, options, upload, workers, progress, on_listed)
    option = "--scratch" if upload else "--out"
    if not needs_unpacking(src) or not (is_url(src) or Path(src).is_file()):
        inputs = list_inputs(src, columns, options.pixels)  # before the folder is created
        inputs = pair_folders(inputs, src, options.map_folders)
        check_maps(inputs, options)
        with _locked_folder(folder, option):
            return packing.run(inputs)
    with _locked_folder(folder, option):
        plain = folder / _UNPACKED
        try:
            unpack(src, plain, options.pixels)
            inputs = pair_folders(list_inputs(str(plain), pixels=options.pixels), src, options.map_folders)
            check_maps(inputs, options)
            return packing.run(inputs)
        finally:
            plain.unlink(missing_ok=True)


def scratch_folder(url: str) -> Path:
    """Return the default folder in which a set for a URL is packed: always the same, so that packing can resume.

    It is in the user's own cache folder, because other users could create a folder of a predictable name in a
    shared one.
    """
    return cache_folder("--scratch") / f"pack-{blake2b(url.encode(), digest_size=8).hexdigest()}"


@contextmanager
def _locked_folder(out: Path, option: str) -> Iterator[None]:
    """Create and lock a set's folder for one packing; remove it at the end if it is new and empty."""
    is_new = not out.exists()
    with ExitStack() as stack:
        try:
            if option == "--scratch":
                make_private_folder(out, option)
            else:
                out.mkdir(parents=True, exist_ok=True)
            allowed = {*_SET_NAMES, *(partial_path(out / name).name for name in _SET_NAMES)}
            foreign = sorted({entry.name for entry in out.iterdir()} - allowed)
            if not any((out / name).exists() for name in (FILE_NAME, JOURNAL_NAME, MARKER_NAME)):
                # files in shards/ and index/ would be replaced: refuse them unless an earlier packing wrote them
                parts = (*out.glob("shards/*"), *out.glob("index/*"))
                foreign += sorted(str(entry.relative_to(out)) for entry in parts)
            if foreign:
                raise ShardError(f"{option} {out} has other files, such as {foreign[0]}; choose a new folder")
            stack.enter_context(lock_folder(out, _LOCK))
        except FolderInUse:
            message = f"another packing into {out} is running; wait for it or choose another {option}"
            raise ShardError(message) from None
        except OSError as error:
            reason = f"cannot be written to ({explain_os_error(error)}); choose another folder"
            raise ShardError(f"{option} {out} {reason}") from error
        try:
            yield
        except OSError as error:
            reason = f"failed ({explain_os_error(error)}); fix that and re-run to resume"
            raise ShardError(f"writing to {out} {reason}") from error
        finally:
            with suppress(OSError):  # keep the error that ended the packing
                (out / _LOCK).unlink(missing_ok=True)
                if (is_new or option == "--scratch") and not any(out.iterdir()):
                    out.rmdir()


class _Packing:
    """One packing into a locked folder; for the arguments, see ``pack``."""

    def __init__(
        self,
        src: str,
        out: Path,
        options: PackOptions,
        upload: Upload | None,
        workers: int,
        progress: bool,
        on_listed: Callable[[Inputs], object] | None,
    ) -> None:
        self.src, self.out, self.options, self.upload = src, out, options, upload
        self.workers, self.progress, self.on_listed = workers, progress, on_listed
        self.done = Progress()
        self._sent = StatisticsBuilder(options.pixels)  # of the shards that this process has sent
        self._identity = _identify(src)

    def run(self, inputs: Inputs) -> PackReport:
        """Pack all items that are in no complete shard yet, and write the manifest."""
        out, upload = self.out, self.upload
        if self.on_listed is not None:
            self.on_listed(inputs)
        if any(item.name.lower().endswith(dicom.SUFFIX) for item in inputs.items):
            dicom.require_extra()
        fingerprint = inputs.fingerprint(json.dumps([_FORMAT, inputs.classes, self.options.identity()]))
        finished = upload.find_finished(fingerprint) if upload else find_finished(out, fingerprint)
        if finished is not None:
            (out / JOURNAL_NAME).unlink(missing_ok=True)
            if upload:
                remove_unfinished(out)
            return PackReport(*finished, inputs.passed_over, is_new=False)
        if tiles := self.options.tiles:
            pixels, max_pixels = self.options.pixels, self.options.max_pixels
            num_maps = sum(len(item.maps) for item in inputs.items)
            inputs.passed_over.add("maps of images that are cut into tiles, passed over", num_maps)
            inputs = cut(inputs, tiles, pixels, max_pixels, self.workers, self.progress)
        self.done = open_journal(out, fingerprint, check_shards=upload is None)
        if upload:
            try:
                upload.begin(fingerprint, self.done.shards)
            except ShardError:
                if not self.done.shards:
                    remove_unfinished(out)
                raise
        (out / "shards").mkdir(exist_ok=True)
        (out / "index").mkdir(exist_ok=True)
        for folder in (out, out / "shards", out / "index"):
            remove_partials(folder)
        done, num_resumed = self.done, len(self.done.shards)
        self._write_shards(inputs)
        if not done.shards:
            remove_unfinished(out)
            if not done.rejected:
                raise ShardError(f"all {done.skipped} tiles of {self.src} are background; lower --tile-contrast")
            first = done.rejected[0]
            count, reason = len(inputs.items), f"{first['path']}: {first['reason']}"
            is_rgb = self.options.pixels.is_rgb
            advice = "images of other kinds need --channels and --dtype" if is_rgb else "check --channels and --dtype"
            raise ShardError(f"none of the {count} images in {self.src} can be used; the first: {reason}; {advice}")
        listed = "".join(json.dumps(rejection) + "\n" for rejection in done.rejected).encode()
        write_whole(out / REJECTED_NAME, listed)
        shards, maps = tuple(done.shards), done.count_maps()
        manifest = SetManifest(shards, inputs.classes, fingerprint, self.options.pixels, maps=maps)
        if not self.options.pixels.is_rgb:
            # shards of an earlier process are only in the store
            location, shards = (upload.url, manifest.shards[:num_resumed]) if upload else (str(out), manifest.shards)
            total = measure(location, replace(manifest, shards=shards), self.workers, self.progress)
            total.merge(self._sent)
            manifest = replace(manifest, statistics=result_of(total, location))
        if upload:
            upload.finish(manifest)
            remove_unfinished(out)
        else:
            manifest.save(out)
            (out / JOURNAL_NAME).unlink()
        inputs.passed_over.add(SKIPPED_TILES, done.skipped)
        return PackReport(manifest, count_reasons(listed), inputs.passed_over)

    def _write_shards(self, inputs: Inputs) -> None:
        items, options, done = inputs.items, self.options, self.done
        order = inputs.order(options.shuffle)
        writer: ShardWriter | None = None
        since = Progress()  # since the latest complete shard
        remaining = order[done.next_position :].tolist()
        outcomes = prepare_all([items[number] for number in remaining], options, self.workers)
        bar = tqdm(
            outcomes, desc="packing", unit=" tiles" if options.tiles else " images", total=len(order),
            initial=done.next_position, disable=None if self.progress else True, smoothing=0.05, **bar_size(),
        )  # fmt: skip
        try:
            for position, (number, outcome) in enumerate(zip(remaining, bar, strict=True), start=done.next_position):
                image, reason, label = outcome.image, outcome.reason, items[number].label
                if options.dedup and (outcome.content in done.seen or outcome.content in since.seen):
                    image, reason = None, "the same bytes as an image before it"
                if outcome.is_background:
                    since.skipped += 1
                    continue
                if image is None:
                    self._check_source()
                    since.rejected.append({"path": items[number].name, "reason": reason})
                    continue
                num_bytes = ShardWriter.bytes_for(image, label, outcome.maps)
                if writer and writer.num_bytes + num_bytes > options.shard_bytes:
                    self._close_shard(writer, position, since)
                    writer, since = None, Progress()
                writer = writer or ShardWriter(self.out, len(done.shards))
                since.rejected += [{"path": items[number].name, "reason": text} for text in outcome.left_out]
                if options.dedup:
                    since.seen.add(outcome.content)
                # the key is the image's number in the source, whatever the packing order
                key = sample_key(number, items[number].name, items[number].tile_name)
                writer.add(key, image, label, outcome.maps)
            if writer:
                self._close_shard(writer, len(order), since)
                writer = None
            else:
                done.rejected += since.rejected
                done.skipped += since.skipped
        finally:
            outcomes.close()
            if writer:
                writer.discard()

    def _check_source(self) -> None:
        """Raise SourceUnreachable if the source was removed or replaced: its images are then missing, not damaged."""
        if _identify(self.src) != self._identity:
            raise SourceUnreachable(
                f"--src {self.src} was removed, replaced or unmounted; once it is back, re-run to resume"
            )

    def _close_shard(self, writer: ShardWriter, position: int, since: Progress) -> None:
        """Finish a shard and record it in the journal, after which it is never packed again."""
        entry = writer.finish()
        since.shards, since.next_position, since.maps = [entry], position, [writer.num_maps]
        if self.upload:
            if not self.options.pixels.is_rgb:
                packed = SetManifest((entry,), pixels=self.options.pixels)
                self._sent.merge(measure(self.out, packed, self.workers, progress=False))
            self.upload.send_shard(entry)
        record_shard(self.out, since)
        self.done.extend(since)


def _identify(src: str) -> tuple[int, int] | None:
    """Return the device and inode of a local source; None if it is a URL or cannot be found."""
    try:
        status = os.stat(src)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
