"""Progress of what takes a while: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines of a log


class _Lines:
    """A text stream on which each redrawing of a bar is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if shown := text.strip():
            self._stream.write(f"{shown}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(what: str, total: int, unit: str, *, shown: bool = True, stream: TextIO | None = None) -> tqdm:
    """A bar of ``total`` units on ``stream`` (stderr); nothing if not ``shown``."""
    stream = stream or sys.stderr
    if stream.isatty():
        return tqdm(total=total, desc=what, unit=unit, file=stream, disable=not shown)
    return tqdm(
        total=total, desc=what, unit=unit, file=_Lines(stream), disable=not shown,
        mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} gone, {remaining} to go",
    )  # fmt: skip
