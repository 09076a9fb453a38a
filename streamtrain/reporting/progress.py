"""The progress of a run: a bar on a terminal, a line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

from streamtrain.reporting.terminal import LINE_SECONDS


class Progress:
    """Shows step, loss, images a second and the time to go, from ``start_step`` to ``steps``."""

    def __init__(self, steps: int, start_step: int, stream: TextIO = sys.stderr) -> None:
        self._steps, self._start_step, self._stream = steps, start_step, stream
        self._began = time.monotonic()
        self._line_due = self._began  # the first step shows at once
        self._bar = (
            tqdm(total=steps, initial=start_step, unit="step", file=stream, dynamic_ncols=True)
            if stream.isatty()
            else None
        )

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show that ``step`` is done; reads ``loss/total`` and ``speed/images_per_second`` if there."""
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
        if now < self._line_due and step < self._steps:
            return
        self._line_due = now + LINE_SECONDS
        seconds_a_step = (now - self._began) / (step - self._start_step)
        left = tqdm.format_interval((self._steps - step) * seconds_a_step)
        print(
            f"step {step}/{self._steps}: {', '.join([*parts, f'{left} to go'])}",
            file=self._stream,
            flush=True,
        )

    def say(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
