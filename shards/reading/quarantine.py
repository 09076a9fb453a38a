"""Log of unusable samples, with a limit on their share.

Given the log, the stream is a pure function again. A sample that could not be *read* is unusable only at the
slot where the read failed: a flaky disk may return it later, and a resumed run must repeat the first one. A sample that
could not be *decoded* is unusable everywhere, because the same bytes fail again.

All ranks append lines to one file; lines are never removed. While the file cannot be written or read, training
continues with the entries in memory.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from shards.errors import SampleError, ShardError
from shards.format.append_log import AppendLog
from shards.format.files import parse_json

MAX_SUBSTITUTES = 100  # attempts to find a usable sample for one slot
_SIGMAS = 5.0

Stage = Literal["read", "decode"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """An unusable sample: one line of the log."""

    slot: int
    shard: str  # file name of the tar
    index: int  # number of the sample in the shard
    key: str  # WebDataset key of the sample
    stage: Stage
    reason: str


class Quarantine:
    """The known unusable samples. Safe to share between threads.

    Args:
        path: the log file, shared by all ranks of a run; existing entries are loaded. None keeps the log in memory.
        max_rate: allowed share of slots with an unusable sample; a share significantly above it stops the run.

    Attributes:
        num_entries: number of samples that this process found unusable.
    """

    def __init__(self, path: Path | None = None, max_rate: float = 0.01) -> None:
        self.path, self.max_rate = path, max_rate
        self.num_entries = 0
        self._num_slots = 0
        self._unreadable: set[tuple[int, str, int]] = set()
        self._undecodable: set[tuple[str, int]] = set()
        self._offset = 0
        self._log = AppendLog(path, is_shared=True) if path is not None else None
        self._has_warned = False
        self._lock = threading.Lock()
        self._load_new()

    def is_unusable(self, slot: int, shard: str, index: int) -> bool:
        """Return whether a sample must not be used at a slot."""
        return (shard, index) in self._undecodable or (slot, shard, index) in self._unreadable

    def add(self, slot: int, error: SampleError, stage: Stage) -> None:
        """Log a sample as unusable at a slot.

        Raises:
            ShardError: too many samples are unusable; gives their number and the latest one.
        """
        entry = Entry(slot, error.shard, error.index, error.key, stage, error.reason)
        with self._lock:
            self._load_new()  # another rank may have logged the same sample
            self.num_entries += 1
            if not self.is_unusable(slot, entry.shard, entry.index):
                self._append(entry)
            self._remember(entry)
            allowed = self.max_rate * self._num_slots
            # exceeding the allowed number by chance must not stop a run, exceeding it by five standard deviations must
            if self.num_entries > allowed + _SIGMAS * max(allowed, 4.0) ** 0.5:
                raise ShardError(self._limit_message(entry))

    def count_slot(self) -> None:
        """Count a slot that is read: the denominator of the share of unusable samples."""
        with self._lock:
            self._num_slots += 1
            if self._log is not None:
                self._log.retry()

    def close(self) -> None:
        """Write the entries that a full disk has delayed."""
        with self._lock:
            if self._log is not None:
                self._log.close()

    def _append(self, entry: Entry) -> None:
        if self._log is not None:
            # a single write, so that lines of several ranks do not interleave
            self._log.append((json.dumps(asdict(entry)) + "\n").encode())

    def _load_new(self) -> None:
        """Load the complete lines appended since the last call."""
        if self.path is None:
            return
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                lines = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(f"{self.path} cannot be read ({error.strerror}); unusable images of earlier starts or other "
                       "ranks may be tried again")  # fmt: skip
            return
        lines = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(lines)
        num_skipped = 0
        for line in filter(None, lines.split(b"\n")):
            # a line torn by a kill or a full disk: the sample is logged again when it fails again
            if (entry := _parse(line)) is None:
                num_skipped += 1
            else:
                self._remember(entry)
        if num_skipped:
            self._warn(f"{self.path}: {num_skipped} invalid lines were skipped")

    def _warn(self, message: str) -> None:
        """Log the first warning about the file."""
        if not self._has_warned:
            logger.warning(message)
        self._has_warned = True

    def _remember(self, entry: Entry) -> None:
        if entry.stage == "decode":
            self._undecodable.add((entry.shard, entry.index))
        else:
            self._unreadable.add((entry.slot, entry.shard, entry.index))

    def _limit_message(self, latest: Entry) -> str:
        log = "" if self.path is None else f"; all are listed in {self.path}"
        return (
            f"{self.num_entries} unusable images in {self._num_slots} slots, far above the allowed share of "
            f"{self.max_rate:g}; check the set with streamtrain verify; the latest: shard {latest.shard}, "
            f"sample {latest.index} (key {latest.key!r}): {latest.reason}{log}"
        )


def _parse(line: bytes) -> Entry | None:
    """Return the entry of a line; None if it is not one."""
    try:
        entry = Entry(**parse_json(line))
    except (ValueError, TypeError):
        return None
    texts = (entry.shard, entry.key, entry.reason)
    is_valid = all(type(number) is int for number in (entry.slot, entry.index)) and all(
        isinstance(text, str) for text in texts
    )
    return entry if is_valid and entry.stage in get_args(Stage) else None
