"""Progress of long operations: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0  # between two lines of a log file


class _Lines:
    """A text stream that writes each redraw of a bar as its own line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(label: str, total: int, unit: str, *, shown: bool = True, stream: TextIO | None = None) -> tqdm:
    """Return a bar of ``total`` units on ``stream`` (default: stderr); it shows nothing if not ``shown``."""
    stream = stream or sys.stderr
    if stream.isatty():
        return tqdm(total=total, desc=label, unit=unit, file=stream, disable=not shown)
    return tqdm(
        total=total, desc=label, unit=unit, file=_Lines(stream), disable=not shown,
        mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} elapsed, {remaining} left",
    )  # fmt: skip


class TrainingProgress:
    """Shows step, loss, images per second and the remaining time, from ``start_step`` to ``steps``."""

    def __init__(self, steps: int, start_step: int, stream: TextIO = sys.stderr) -> None:
        self._steps, self._start_step, self._stream = steps, start_step, stream
        self._start = time.monotonic()
        self._next_line = self._start  # the first step is shown at once
        self._bar = (
            tqdm(total=steps, initial=start_step, unit="step", file=stream, dynamic_ncols=True)
            if stream.isatty()
            else None
        )

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show that ``step`` is complete, with ``loss/total`` and ``speed/images_per_second`` if given."""
        parts = []
        if "loss/total" in scalars:
            parts.append(f"loss {scalars['loss/total']:.4f}")
        if "speed/images_per_second" in scalars:
            parts.append(f"{scalars['speed/images_per_second']:.1f} images/s")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now < self._next_line and step < self._steps:
            return
        self._next_line = now + LINE_SECONDS
        seconds_per_step = (now - self._start) / (step - self._start_step)
        parts.append(f"{tqdm.format_interval((self._steps - step) * seconds_per_step)} left")
        print(f"step {step}/{self._steps}: {', '.join(parts)}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
