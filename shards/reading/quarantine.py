"""The log of samples that could not be used, and when there are too many of them.

A stream with its log is a pure function again: a sample that could not be *read* counts as unusable at the slot
where that happened (a flaky disk may serve it well later, and a resumed run must do what the first one did); one
that could not be *decoded* counts as unusable everywhere, since the same bytes fail the same way.

All ranks append to one file, a line at a time; nothing is ever taken out of it.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shards.errors import SampleError, ShardError

FILE_NAME = "quarantine.jsonl"
MAX_IN_A_ROW = 100  # unusable samples for one slot
_SIGMAS = 5.0

Stage = Literal["read", "decode"]


@dataclass(frozen=True)
class Entry:
    """A sample that was unusable at a slot."""

    slot: int
    shard: str  # name of the tar
    index: int  # of the sample in the shard
    key: str  # of the sample, in WebDataset's sense
    stage: Stage
    reason: str


class Quarantine:
    """What is known to be unusable. Safe to share between threads.

    Args:
        path: the log, shared by all ranks of a run; what is in it already holds. None keeps the log in memory.
        max_rate: share of slots whose sample may be unusable; a share clearly above it stops the run.

    Attributes:
        num_entries: samples found unusable by this process.
    """

    def __init__(self, path: Path | None = None, max_rate: float = 0.01) -> None:
        self.path, self.max_rate = path, max_rate
        self.num_entries = 0
        self._num_slots = 0
        self._unreadable: set[tuple[int, str, int]] = set()
        self._undecodable: set[tuple[str, int]] = set()
        self._offset = 0
        self._lock = threading.Lock()
        self._take_in()

    def holds(self, slot: int, shard: str, index: int) -> bool:
        """Whether a sample must not be used at a slot."""
        return (shard, index) in self._undecodable or (slot, shard, index) in self._unreadable

    def add(self, slot: int, error: SampleError, stage: Stage) -> None:
        """Log a sample as unusable at a slot.

        Raises:
            ShardError: too many samples are unusable; reports how many, and the latest.
        """
        entry = Entry(slot, error.shard, error.index, error.key, stage, error.reason)
        with self._lock:
            self._take_in()  # another rank may have found the same
            self.num_entries += 1
            if not self.holds(slot, entry.shard, entry.index):
                self._append(entry)
            self._note(entry)
            bound = self.max_rate * self._num_slots
            # A share that is above the bound by chance must not stop a run: five standard deviations must.
            if self.num_entries > bound + _SIGMAS * max(bound, 4.0) ** 0.5:
                raise ShardError(self._report(entry))

    def count_slot(self) -> None:
        """Count a slot that is looked at, for the share of unusable ones."""
        with self._lock:
            self._num_slots += 1

    def _append(self, entry: Entry) -> None:
        if self.path is not None:
            line = (json.dumps(asdict(entry)) + "\n").encode()
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(file, line)  # one call, so that lines of several ranks do not mix
            finally:
                os.close(file)

    def _take_in(self) -> None:
        """Read what was appended since the last look, whole lines only."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(lines)
        for line in lines.splitlines():
            try:
                self._note(Entry(**json.loads(line)))
            except (ValueError, TypeError):
                continue  # a line torn by a kill, and what was appended to it: found again if it still holds

    def _note(self, entry: Entry) -> None:
        if entry.stage == "decode":
            self._undecodable.add((entry.shard, entry.index))
        else:
            self._unreadable.add((entry.slot, entry.shard, entry.index))

    def _report(self, latest: Entry) -> str:
        log = "" if self.path is None else f"; {self.path} lists them all"
        return (
            f"{self.num_entries} images could not be used where {self._num_slots} were wanted, far above the allowed "
            f"share of {self.max_rate:g}; check the set with streamtrain verify; the latest: shard {latest.shard}, "
            f"sample {latest.index} (key {latest.key!r}): {latest.reason}{log}"
        )
