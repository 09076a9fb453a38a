"""When a run should stop early: a signal to any rank, or a ``STOP`` file in the run folder."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: start the same command again
EXIT_INTERRUPTED = 130

STOP_NAME = "STOP"


class StopRequest:
    """Remembers that this rank was asked to stop; the step under way is finished and checkpointed first.

    SIGTERM, SIGUSR1 and the ``STOP`` file mean exit 75, Ctrl-C means exit 130; a second Ctrl-C stops at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_NAME
        self._signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def code(self) -> int:
        """Exit status that this rank wants: 0 to go on, else 75 or 130."""
        if self._signal == signal.SIGINT:
            return EXIT_INTERRUPTED
        return EXIT_PREEMPTED if self._signal is not None or self._file.exists() else 0

    def clear(self) -> None:
        """Remove the ``STOP`` file, so that the next start goes on."""
        self._file.unlink(missing_ok=True)
