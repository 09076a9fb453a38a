"""End a process whose training makes no progress, and write every thread's stack to the run directory.

stacks/2026-03-01T14-05-59-rank-00003.txt
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from shards.errors import ShardError
from streamtrain.errors import StreamtrainError

FOLDER_NAME = "stacks"
EXIT_HUNG = 70  # sysexits.h EX_SOFTWARE: nothing was saved; run the same command again
Item = TypeVar("Item")


class HangDetector:
    """Monitors a ``with`` block from its own thread; if the block raises, the stacks are written as well."""

    def __init__(self, run_dir: Path, rank: int, seconds: float) -> None:
        """``seconds``: time without progress after which the process ends; 0: never."""
        self._run_dir, self._rank, self._seconds = run_dir, rank, seconds
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang detector", daemon=True)

    def mark_progress(self) -> None:
        """Restart the time limit."""
        self._last = time.monotonic()

    def wrap(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items and mark progress at each."""
        for item in items:
            self.mark_progress()
            yield item

    def __enter__(self) -> HangDetector:
        # if a library aborts the process, the stacks are written to stderr
        faulthandler.enable()
        self.mark_progress()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._seconds:
            self._thread.join()
        # user errors and interruptions need no stacks
        if isinstance(error, Exception) and not isinstance(error, StreamtrainError | ShardError):
            self._dump("".join(traceback.format_exception(error)))

    def _run(self) -> None:
        while not self._closed.wait(min(self._seconds / 10, 10.0)):
            # If a call never returns and holds the GIL, this thread cannot run either: then a C thread of faulthandler
            # writes the stacks to stderr and ends the process.
            # Without memory for that thread, this one still ends the process.
            with suppress(RuntimeError, MemoryError):
                faulthandler.dump_traceback_later(2 * self._seconds, exit=True)
            if time.monotonic() - self._last > self._seconds:
                try:
                    reason = f"rank {self._rank} made no progress for {self._seconds:g} s (engine.hang_timeout_seconds)"
                    path = self._dump(reason + "\n")
                    # not through the log, whose lock the hanging thread may hold
                    print(f"error: {reason}; the stacks of its threads are in {path}", file=sys.stderr, flush=True)
                finally:
                    os._exit(EXIT_HUNG)
        faulthandler.cancel_dump_traceback_later()

    def _dump(self, reason: str) -> str:
        """Write every thread's stack; return the path."""
        now = time.strftime("%Y-%m-%dT%H-%M-%S")
        path = self._run_dir / FOLDER_NAME / f"{now}-rank-{self._rank:05d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{now} rank {self._rank}, process {os.getpid()} on {socket.gethostname()}\n{reason}\n")
                file.flush()
                faulthandler.dump_traceback(file)
            return str(path)
        except OSError as error:
            faulthandler.dump_traceback()
            return f"the lines above, because {path} cannot be written ({error.strerror})"
