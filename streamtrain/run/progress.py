"""Progress of long operations: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from shards.progress import BarSize, bar_size
from streamtrain.run.tags import HEADLINES

LINE_SECONDS = 10.0  # between two lines of a log file
_EVALUATION_MARK = b'"eval/'
# of a bar beside the text; a narrower terminal shows only the text
_MIN_BAR = 8
# columns after the bar, for the ^C that a terminal shows
_FREE = 3


class _Lines:
    """A text stream that writes each redraw of a bar as its own line, unless the line before has the same count."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._count = ""

    def write(self, text: str) -> None:
        # tqdm draws the last count again when it closes
        if (line := text.strip()) and (count := line.rsplit(", ", 2)[0]) != self._count:
            self._stream.write(f"{line}\n")
            self._count = count

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(label: str, total: int, unit: str, *, shown: bool = True, stream: TextIO | None = None) -> tqdm:
    """Return a bar of ``total`` units on ``stream`` (default: stderr); it shows nothing if not ``shown``."""
    stream = stream or sys.stderr
    if stream.isatty():
        return tqdm(total=total, desc=label, unit=unit, file=stream, disable=not shown, **bar_size(stream))
    return tqdm(
        total=total, desc=label, unit=unit, file=_Lines(stream), disable=not shown,
        mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} elapsed, {remaining} left",
    )  # fmt: skip


class Evaluations:
    """The last and the best evaluation of a run, as text such as ``kNN 53.0% at step 40``.

    Args:
        metric: to show, such as ``knn_20``; None: the first of ``HEADLINES`` that is measured.
    """

    def __init__(self, metric: str | None = None) -> None:
        self._tags = ([f"eval/{metric}"] if metric is not None else []) + list(HEADLINES)
        self._last: tuple[str, int, float] | None = None
        self._best: tuple[str, int, float] | None = None

    def add(self, step: int, scalars: Mapping[str, float]) -> bool:
        """Record the evaluation in the scalars of a completed step; return False if they have none."""
        tag = next((tag for tag in self._tags if tag in scalars), None)
        if tag is None:
            return False
        self._last = (tag, step, scalars[tag])
        if self._best is None or self._best[0] != tag or scalars[tag] > self._best[2]:
            self._best = self._last
        return True

    def read(self, metrics: Path, last_step: int) -> None:
        """Add the evaluations up to ``last_step`` of a ``metrics.jsonl``, as far as it can be read."""
        try:
            with metrics.open("rb") as file:
                for line in file:
                    # a line has thousands of characters, and only one in a thousand lines has an evaluation
                    if _EVALUATION_MARK in line:
                        record = json.loads(line)
                        values = {tag: value for tag, value in record.items() if isinstance(value, float)}
                        if record["step"] <= last_step:
                            self.add(record["step"], values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # only the text of the progress depends on it
            return

    def line(self) -> str:
        """Return the last evaluation and, unless it is the best one, the best."""
        assert self._last is not None and self._best is not None
        (tag, step, value), (_, best_step, best) = self._last, self._best
        best_text = "best so far" if best_step == step else f"best {best:.1%} at step {best_step}"
        return f"{HEADLINES.get(tag, tag)} {value:.1%} ({best_text})"

    def texts(self) -> list[str]:
        """Return the evaluations as text, the most detailed first; empty without an evaluation."""
        if self._last is None or self._best is None:
            return []
        (tag, step, value), (_, best_step, best) = self._last, self._best
        short = f"{HEADLINES.get(tag, tag)} {value:.1%}"
        long = f"{short} at step {step}"
        return [f"{long} (best {best:.1%} at step {best_step})", long, short]


class TrainingProgress:
    """Shows step, loss, images per second, the remaining time and the last evaluation, up to step ``steps``."""

    def __init__(
        self, steps: int, start_step: int, stream: TextIO | None = None, evaluations: Evaluations | None = None
    ) -> None:
        self._steps, self._start_step, self._stream = steps, start_step, stream or sys.stderr
        self._evaluations = evaluations or Evaluations()
        self._start = time.monotonic()
        self._next_line = self._start  # the first step is shown at once
        # the first step of a process is slow, so the speed counts from its end
        self._first: tuple[int, float] | None = None
        self._bar = (
            tqdm(
                total=steps, initial=start_step, desc=f"step {start_step}/{steps}", file=self._stream,
                bar_format="{desc} {bar}", **self._bar_size(),
            )
            if self._stream.isatty()
            else None
        )  # fmt: skip

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show that ``step`` is complete, with ``loss/total`` and ``speed/images_per_second`` if given."""
        now = time.monotonic()
        is_evaluated = self._evaluations.add(step, scalars)
        if self._bar is not None:
            parts = [f"step {step}/{self._steps}", *self._parts(step, scalars, now)]
            self._bar.ncols = self._bar_size()["ncols"]
            self._bar.set_description_str(fitting(parts, self._evaluations.texts(), self._bar.ncols), refresh=False)
            self._bar.update(step - self._bar.n)
            if is_evaluated:
                self._bar.write(f"step {step}: {self._evaluations.line()}", file=self._stream)
            return
        if now < self._next_line and step < self._steps and not is_evaluated:
            return
        self._next_line = now + LINE_SECONDS
        evaluation = [self._evaluations.line()] if is_evaluated else self._evaluations.texts()[:1]
        parts = self._parts(step, scalars, now) + evaluation
        print(f"step {step}/{self._steps}: {', '.join(parts)}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _parts(self, step: int, scalars: Mapping[str, float], now: float) -> list[str]:
        parts = []
        if "loss/total" in scalars:
            parts.append(f"loss {scalars['loss/total']:.4f}")
        if "speed/images_per_second" in scalars:
            parts.append(f"{scalars['speed/images_per_second']:.1f} images/s")
        from_step, since = self._first or (self._start_step, self._start)
        self._first = self._first or (step, now)
        if step > from_step:
            parts.append(f"{tqdm.format_interval((self._steps - step) * (now - since) / (step - from_step))} left")
        return parts

    def _bar_size(self) -> BarSize:
        """Return the size of the bar in characters, which follows the size of the window."""
        size = bar_size(self._stream)
        return {**size, "ncols": max(size["ncols"] - _FREE, _MIN_BAR)}


def fitting(parts: list[str], evaluations: list[str], columns: int) -> str:
    """Join ``parts`` and the most detailed of ``evaluations`` that leaves space for a bar; drop parts that do not fit.

    Args:
        columns: width of text and bar in characters.
    """
    for last in evaluations:
        if len(text := ", ".join([*parts, last])) + _MIN_BAR < columns:
            return text
    while len(parts) > 1 and len(", ".join(parts)) + 2 > columns:
        parts = parts[:-1]
    return ", ".join(parts)
