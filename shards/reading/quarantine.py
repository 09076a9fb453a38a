"""Log of unusable samples, with a limit on their share.

Given the log, the stream is a pure function again. A sample that could not be *read* is unusable only at the
slot where the read failed: a flaky disk may return it later, and a resumed run must repeat the first one. A sample that
could not be *decoded* is unusable everywhere, because the same bytes fail again.

All ranks append lines to one file; lines are never removed.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shards.errors import SampleError, ShardError

MAX_SUBSTITUTES = 100  # attempts to find a usable sample for one slot
_SIGMAS = 5.0

Stage = Literal["read", "decode"]


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

    def _append(self, entry: Entry) -> None:
        if self.path is not None:
            line = (json.dumps(asdict(entry)) + "\n").encode()
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(file, line)  # a single call, so that lines of several ranks do not interleave
            finally:
                os.close(file)

    def _load_new(self) -> None:
        """Load the complete lines appended since the last call."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(lines)
        for line in lines.splitlines():
            try:
                self._remember(Entry(**json.loads(line)))
            except (ValueError, TypeError):
                continue  # a line torn by a kill; the sample is logged again when it fails again

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
