"""What a run is asked for from outside: to stop early, or to save, by a signal to any rank or a file in its folder."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: start the same command again
EXIT_INTERRUPTED = 130
# not an exit status: save and go on. Of several wishes the largest is granted.
SAVE = 1

STOP_NAME = "STOP"
SAVE_NAME = "SAVE"


class Requests:
    """Remembers what this rank was asked for; all ranks agree on it at the end of a step.

    SIGTERM, SIGUSR1 and the ``STOP`` file mean exit 75, Ctrl-C means exit 130, the ``SAVE`` file a checkpoint. A
    second Ctrl-C ends the process at once, also one that waits for another rank: a thread of its own hears of signals,
    since Python runs handlers in the main thread, and only between two of its own instructions.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Only rank 0 looks for files: a thousand ranks that did so would be a burden to the file system."""
        self._stop_file = run_dir / STOP_NAME if rank == 0 else None
        self._save_file = run_dir / SAVE_NAME if rank == 0 else None
        self._exit_code = 0
        self._saving = False
        heard, said = os.pipe()
        os.set_blocking(said, False)
        signal.set_wakeup_fd(said)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            # without a handler in Python there would be nothing to hear
            signal.signal(number, lambda number, frame: None)

    def _listen(self, heard: int) -> None:
        while True:
            for number in os.read(heard, 64):
                if number == signal.SIGINT and self._exit_code == EXIT_INTERRUPTED:
                    os._exit(EXIT_INTERRUPTED)
                # a launcher that is interrupted sends SIGTERM after the SIGINT that the terminal has sent
                wanted = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
                self._exit_code = max(self._exit_code, wanted)

    def code(self) -> int:
        """What this rank wants: 0 to go on, ``SAVE``, or an exit status: 75 or 130."""
        if self._exit_code:
            return self._exit_code
        if self._stop_file is not None and self._stop_file.exists():
            return EXIT_PREEMPTED
        return SAVE if self._save_file is not None and not self._saving and self._save_file.exists() else 0

    def saving(self) -> None:
        """A checkpoint is begun, for whatever reason: that is what ``SAVE`` asks for, if it is there."""
        self._saving = self._saving or (self._save_file is not None and self._save_file.exists())

    def saved(self) -> None:
        """It has ended: whoever made ``SAVE`` sees that by its absence."""
        if self._saving:
            self._saving = not _removed(self._save_file)

    def stopped(self) -> None:
        """Remove the ``STOP`` file, so that the next start goes on."""
        _removed(self._stop_file)


def _removed(path: Path | None) -> bool:
    """Whether the file could be removed: one that cannot must not be granted for ever."""
    try:
        if path is not None:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
