"""A process that dies at a chosen one of its calls that change the disk, and what a power cut would take besides."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FailingDisk:
    """Counts the calls of one thread, and kills the process at the ``fatal``-th, from 0: a write is then half done.

    ``report`` gets the calls so far and what was not yet certain to be on the disk: files written since they were last
    synced, names made since their folder was, and renames.
    """

    def __init__(self, thread: str, report: Path, fatal: int | None) -> None:
        self._thread, self._report, self._fatal = thread, report, fatal
        self._calls: list[str] = []
        self._written: set[str] = set()
        self._made: list[str] = []
        self._renamed: list[tuple[str, str, str | None]] = []
        self._real = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "replace", "mkdir")}
        self._real |= {name: getattr(os, name) for name in ("unlink", "rmdir")}
        for name in self._real:
            setattr(os, name, self._counted(name))

    def _counted(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            reads = name == "open" and not arguments[1] & os.O_CREAT
            if threading.current_thread().name != self._thread or reads:
                return self._real[name](*arguments, **named)
            if len(self._calls) == self._fatal:
                if name == "write":
                    self._real["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
                    self._written.add(_path_of(arguments[0]))
                self.tell()
                os.kill(os.getpid(), signal.SIGKILL)
            self._calls.append(name)
            self._note(name, arguments)
            return self._real[name](*arguments, **named)

        return call

    def _note(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write":
            self._written.add(_path_of(arguments[0]))
        elif name in ("open", "mkdir"):
            self._made.append(str(arguments[0]))
        elif name == "fsync":
            path = _path_of(arguments[0])
            self._written.discard(path)
            if stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                self._made = [made for made in self._made if os.path.dirname(made) != path]
                self._renamed = [each for each in self._renamed if os.path.dirname(each[1]) != path]
        elif name in ("rename", "replace"):
            before, after = map(str, arguments)
            old = Path(after).read_text() if os.path.isfile(after) else None
            self._renamed.append((before, after, old))
            self._written = {path.replace(before, after) for path in self._written}
            self._made = [path.replace(before, after) for path in self._made]

    def tell(self) -> None:
        """Write the report."""
        found = {"calls": self._calls, "written": sorted(self._written), "made": self._made, "renamed": self._renamed}
        file = self._real["open"](self._report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._real["write"](file, json.dumps(found).encode())


def cut_power(report: Path) -> None:
    """Take from the disk everything that a killed process was not yet certain of."""
    found = json.loads(report.read_text())
    for path in found["written"]:
        if os.path.exists(path):
            os.truncate(path, os.path.getsize(path) // 3)
    for path in reversed(found["made"]):
        if os.path.isfile(path):
            os.unlink(path)
    for before, after, old in reversed(found["renamed"]):
        if os.path.exists(after):
            os.rename(after, before)
        if old is not None:
            Path(after).write_text(old)


def _path_of(file: int) -> str:
    return os.readlink(f"/proc/self/fd/{file}")
