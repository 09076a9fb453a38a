"""How much a folder holds, as somebody else counts it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def folder_bytes(folder: Path) -> int:
    """The bytes of all files of a folder; names that are gone meanwhile are left out."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
    return total


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The most bytes that a folder has had at any moment so far, as the one entry of the list; looks all the time."""
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
