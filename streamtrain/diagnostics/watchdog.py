"""Ends a process whose training no longer moves, and leaves every thread's stack in the run folder.

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
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from shards.errors import ShardError
from streamtrain.errors import StreamtrainError

FOLDER_NAME = "stacks"
EXIT_HUNG = 70  # sysexits.h EX_SOFTWARE: nothing was saved; start the same command again
Item = TypeVar("Item")


class Watchdog:
    """Watches over a ``with`` block from a thread of its own; a block that fails leaves its stacks as well.

    Args:
        run_dir: the run folder.
        rank: of this process.
        seconds: without a ``beat``, after which the process ends; 0: never.
    """

    def __init__(self, run_dir: Path, rank: int, seconds: float) -> None:
        self._run_dir, self._rank, self._seconds = run_dir, rank, seconds
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Training has moved."""
        self._last = time.monotonic()

    def beating(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each of which is a sign of life."""
        for item in items:
            self.beat()
            yield item

    def __enter__(self) -> Watchdog:
        # what a library does to a process that it finds faulty (most often an abort) is told on stderr, with the stacks
        faulthandler.enable()
        self.beat()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._seconds:
            self._thread.join()
        # what a user can mend, and an interruption, needs no stacks
        if isinstance(error, Exception) and not isinstance(error, StreamtrainError | ShardError):
            self._dump("".join(traceback.format_exception(error)))

    def _watch(self) -> None:
        while not self._closed.wait(min(self._seconds / 10, 10.0)):
            # In case that a call which never returns keeps all other threads of the interpreter from running, this one
            # too: then a thread below the interpreter writes the stacks to stderr, and ends the process.
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True)
            if time.monotonic() - self._last > self._seconds:
                reason = f"rank {self._rank} has got no further for {self._seconds:g} s (engine.hang_timeout_seconds)"
                path = self._dump(reason + "\n")
                print(f"error: {reason}; its threads' stacks are in {path}", file=sys.stderr, flush=True)
                os._exit(EXIT_HUNG)
        faulthandler.cancel_dump_traceback_later()

    def _dump(self, reason: str) -> str:
        """Write every thread's stack; returns where to."""
        began = time.strftime("%Y-%m-%dT%H-%M-%S")
        path = self._run_dir / FOLDER_NAME / f"{began}-rank-{self._rank:05d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{began} rank {self._rank}, process {os.getpid()} on {socket.gethostname()}\n{reason}\n")
                file.flush()
                faulthandler.dump_traceback(file)
            return str(path)
        except OSError as error:
            faulthandler.dump_traceback()
            return f"the lines above, since {path} cannot be written ({error.strerror})"
