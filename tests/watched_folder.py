"""Independent measurement of the size of a folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder, without files that disappear meanwhile."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
    return total


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Measure a folder continuously; yields a list with one entry, the largest size in bytes so far."""
    most, stop = [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.001):
            if folder.is_dir():
                most[0] = max(most[0], folder_bytes(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
