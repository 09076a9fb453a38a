"""The journal of a packing, which lists the complete shards, so that an interrupted packing can be resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.errors import ShardError
from shards.format.files import write_whole
from shards.format.set_manifest import FILE_NAME, JOURNAL_NAME, SetManifest, ShardEntry
from shards.packing.summary import count_reasons
from shards.packing.upload import MARKER_NAME, REJECTED_NAME


@dataclass
class Progress:
    """Progress of a packing; each line of the journal extends it."""

    shards: list[ShardEntry] = field(default_factory=list)
    next_position: int = 0  # of the first item that is in no complete shard
    rejected: list[dict[str, str]] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # content hashes, with ``dedup``
    skipped: int = 0  # tiles of background
    maps: list[dict[str, int]] = field(default_factory=list)  # number of maps of each kind in each shard

    def extend(self, later: Progress) -> None:
        self.shards += later.shards
        self.next_position = later.next_position
        self.rejected += later.rejected
        self.seen |= later.seen
        self.skipped += later.skipped
        self.maps += later.maps

    def count_maps(self) -> dict[str, tuple[int, ...]]:
        """Return the number of maps in each shard, by kind."""
        kinds = dict.fromkeys(kind for counts in self.maps for kind in counts)
        return {kind: tuple(counts.get(kind, 0) for counts in self.maps) for kind in kinds}


def find_finished(out: Path, fingerprint: str) -> tuple[SetManifest, Counter[str] | None] | None:
    """Return the finished set in a folder and its rejected images by reason, or None; refuse another set."""
    if not (out / FILE_NAME).exists():
        return None
    manifest = SetManifest.load(out)
    if manifest.fingerprint != fingerprint:
        reason = "already contains another shard set, of other images or options"
        raise ShardError(f"--out {out} {reason}; choose a new folder, or delete it")
    log = out / REJECTED_NAME
    return manifest, count_reasons(log.read_bytes()) if log.exists() else None


def open_journal(out: Path, fingerprint: str, check_shards: bool) -> Progress:
    """Return the progress of an interrupted packing; start a journal if there is none.

    Args:
        check_shards: complete shards must still exist; those from the first missing one on are packed again.

    Raises:
        ShardError: the folder contains an interrupted packing of something else.
    """
    path = out / JOURNAL_NAME
    done = Progress()
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if not lines:
        write_whole(path, (json.dumps({"fingerprint": fingerprint}) + "\n").encode())
        return done
    try:
        is_same = json.loads(lines[0])["fingerprint"] == fingerprint
    except (ValueError, TypeError, KeyError):
        is_same = False
    if not is_same:
        raise ShardError(
            f"--out {out} contains an interrupted packing of another source or with other options; delete it or choose "
            "a new folder"
        )
    valid = [lines[0]]
    for line in lines[1:]:
        try:
            entry = json.loads(line)
            shard = ShardEntry(**entry["shard"])
            skipped = int(entry.get("skipped", 0))
            seen, maps = set(entry["seen"]), dict(entry.get("maps", {}))
            part = Progress([shard], entry["next_position"], entry["rejected"], seen, skipped, [maps])
        except (ValueError, TypeError, KeyError):
            break  # torn by the kill
        if check_shards and not _is_complete(out, shard, maps):
            break
        valid.append(line)
        done.extend(part)
    write_whole(path, ("\n".join(valid) + "\n").encode())
    return done


def record_shard(out: Path, part: Progress) -> None:
    """Add a complete shard to the journal durably, after which it is never packed again."""
    (entry,), (maps,) = part.shards, part.maps
    line = {
        "shard": asdict(entry), "next_position": part.next_position, "rejected": part.rejected,
        "seen": sorted(part.seen),
    }  # fmt: skip
    line |= {name: value for name, value in (("skipped", part.skipped), ("maps", maps)) if value}
    with open(out / JOURNAL_NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _is_complete(out: Path, shard: ShardEntry, kinds: Iterable[str]) -> bool:
    tar, records = out / "shards" / shard.name, out / "index" / shard.index_name
    indexes = [records, records.with_suffix(".idx"), *(out / "index" / shard.map_index_name(kind) for kind in kinds)]
    try:
        return tar.stat().st_size == shard.bytes and all(path.is_file() for path in indexes)
    except OSError:
        return False


def remove_unfinished(out: Path) -> None:
    for name in ("shards", "index"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (JOURNAL_NAME, MARKER_NAME, REJECTED_NAME, FILE_NAME):
        (out / name).unlink(missing_ok=True)
