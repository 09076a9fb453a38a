"""Kill this process at a chosen file-system call, and remove from the disk all writes that a power cut could lose."""

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
    """Count the modifying calls of one thread and kill the process at call number ``fatal``, from 0.

    A fatal write is half done. ``report`` lists the calls so far and everything not yet synced to the disk: files
    written since their last fsync, and names created or renamed since the last fsync of their folder.
    """

    def __init__(self, thread: str, report: Path, fatal: int | None) -> None:
        self._thread, self._report, self._fatal = thread, report, fatal
        self._calls: list[str] = []
        self._written: set[str] = set()
        self._created: list[str] = []
        self._renamed: list[tuple[str, str, str | None]] = []
        self._real = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "replace", "mkdir")}
        self._real |= {name: getattr(os, name) for name in ("unlink", "rmdir")}
        for name in self._real:
            setattr(os, name, self._wrap(name))

    def _wrap(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            reads = name == "open" and not arguments[1] & os.O_CREAT
            if threading.current_thread().name != self._thread or reads:
                return self._real[name](*arguments, **named)
            if len(self._calls) == self._fatal:
                if name == "write":
                    self._real["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
                    self._written.add(_path_of(arguments[0]))
                self.write_report()
                os.kill(os.getpid(), signal.SIGKILL)
            self._calls.append(name)
            self._record(name, arguments)
            return self._real[name](*arguments, **named)

        return call

    def _record(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write":
            self._written.add(_path_of(arguments[0]))
        elif name in ("open", "mkdir"):
            self._created.append(str(arguments[0]))
        elif name == "fsync":
            path = _path_of(arguments[0])
            self._written.discard(path)
            if stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                self._created = [name for name in self._created if os.path.dirname(name) != path]
                self._renamed = [each for each in self._renamed if os.path.dirname(each[1]) != path]
        elif name in ("rename", "replace"):
            before, after = map(str, arguments)
            old = Path(after).read_text() if os.path.isfile(after) else None
            self._renamed.append((before, after, old))
            self._written = {path.replace(before, after) for path in self._written}
            self._created = [path.replace(before, after) for path in self._created]

    def write_report(self) -> None:
        """Write the report, unaffected by the patched functions."""
        report = {"calls": self._calls, "written": sorted(self._written)}
        report |= {"created": self._created, "renamed": self._renamed}
        file = self._real["open"](self._report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._real["write"](file, json.dumps(report).encode())


def cut_power(report: Path) -> None:
    """Undo everything in the report that was not yet synced to the disk."""
    unsynced = json.loads(report.read_text())
    for path in unsynced["written"]:
        if os.path.exists(path):
            os.truncate(path, os.path.getsize(path) // 3)
    for path in reversed(unsynced["created"]):
        if os.path.isfile(path):
            os.unlink(path)
    for before, after, old in reversed(unsynced["renamed"]):
        if os.path.exists(after):
            os.rename(after, before)
        if old is not None:
            Path(after).write_text(old)


def _path_of(file: int) -> str:
    return os.readlink(f"/proc/self/fd/{file}")
