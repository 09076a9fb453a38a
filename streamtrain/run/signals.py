"""Requests to a running process: stop early or save, by a signal to any rank or a file in the run directory."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING

from streamtrain.errors import StreamtrainError

if TYPE_CHECKING:
    from pathlib import Path

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DRIFTED = 3  # evaluation.stop_if_below
EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: start the same command again
EXIT_INTERRUPTED = 130
STOP_STATUSES = (EXIT_PREEMPTED, EXIT_INTERRUPTED)
# save and continue; not an exit code. Of several requests the highest number wins.
SAVE = 1
# from a stop signal in the first step until the process ends without a checkpoint
FIRST_STEP_SECONDS = 5.0

STOP_NAME = "STOP"
SAVE_NAME = "SAVE"


class Requests:
    """Requests that this rank has received; the ranks combine them at the end of each step.

    SIGTERM, SIGUSR1 and the ``STOP`` file stop the run with exit code 75, Ctrl-C with 130, and the ``SAVE`` file saves
    a checkpoint. A second Ctrl-C ends the process at once, even while it waits in a collective: a thread receives the
    signals, because Python runs signal handlers only between instructions of the main thread.

    The thread also ends a process whose first step takes longer than ``FIRST_STEP_SECONDS`` after a signal: no step is
    complete, so there is nothing to save.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Only rank 0 checks for files, because checks by a thousand ranks would overload the file system."""
        self._stop_file = run_dir / STOP_NAME if rank == 0 else None
        self._save_file = run_dir / SAVE_NAME if rank == 0 else None
        self._run_dir, self._is_shown = run_dir, rank == 0
        self._exit_code = 0
        self._is_saving = self._is_stop_file_seen = self._has_step = False
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        signal.set_wakeup_fd(sender)
        threading.Thread(target=self._receive, args=(receiver,), name="signals", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            # the wake-up pipe gets only signals that have a Python handler
            signal.signal(number, lambda number, frame: None)

    def _receive(self, receiver: int) -> None:
        poll, deadline = select.poll(), float("inf")
        poll.register(receiver, select.POLLIN)
        while True:
            if self._has_step:
                deadline = float("inf")
            is_endless = deadline == float("inf")
            if not poll.poll(None if is_endless else max(0.0, deadline - time.monotonic()) * 1000):
                if not self._has_step:
                    self._show("stopped in the first step: there is nothing to save")
                    os._exit(self._exit_code)
                continue
            for number in os.read(receiver, 64):
                if number == signal.SIGINT and self._exit_code == EXIT_INTERRUPTED:
                    try:
                        self._show_end()
                    finally:
                        os._exit(EXIT_INTERRUPTED)
                if not self._exit_code:
                    again = "; press Ctrl-C again to stop without saving" if number == signal.SIGINT else ""
                    late = "" if self._has_step else f" if the first step ends within {FIRST_STEP_SECONDS:g} s"
                    self._show(f"stopping: saving a checkpoint{late}{again}")
                    deadline = time.monotonic() + FIRST_STEP_SECONDS
                # an interrupted launcher sends SIGTERM after the terminal has sent SIGINT
                exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_PREEMPTED
                self._exit_code = max(self._exit_code, exit_code)

    def _show(self, text: str) -> None:
        if self._is_shown:
            # loaded long before; importing it with this module would delay the handling of Ctrl-C at the start
            import logging

            logging.getLogger(__name__).info(text)

    def _show_end(self) -> None:
        """Show which steps are lost when the run ends without a checkpoint."""
        if not self._is_shown:
            return
        # loaded long before, as above
        from streamtrain.run.directory import saved_steps
        from streamtrain.run.logs import close_bars

        try:
            steps = saved_steps(self._run_dir)
        except StreamtrainError:
            steps = []
        # otherwise the prompt of the shell would be in the line of the bar
        close_bars()
        lost = f"the steps since step {steps[-1]} are lost" if steps else "all steps are lost"
        self._show(f"stopped without saving a checkpoint; {lost}")

    def stop_code(self) -> int:
        """Return the exit code 75 or 130 to stop, ``SAVE`` to save and continue, or 0."""
        if self._exit_code:
            return self._exit_code
        if _exists(self._stop_file):
            if not self._is_stop_file_seen:
                self._show(f"stopping: saving a checkpoint, because {self._stop_file} exists")
            self._is_stop_file_seen = True
            return EXIT_PREEMPTED
        return SAVE if not self._is_saving and _exists(self._save_file) else 0

    def mark_step_completed(self) -> None:
        """Record that a step is complete, after which a stop waits for the current step and saves a checkpoint."""
        self._has_step = True

    def mark_save_started(self) -> None:
        """Record the start of a checkpoint, which fulfils the request of an existing ``SAVE`` file."""
        self._is_saving = self._is_saving or _exists(self._save_file)

    def mark_save_finished(self) -> None:
        """Remove the ``SAVE`` file if it existed when the checkpoint was started."""
        if self._is_saving:
            self._is_saving = not _remove(self._save_file)

    def remove_stop_file(self) -> None:
        """Remove the ``STOP`` file so that the next start continues the run."""
        _remove(self._stop_file)


def has_stop_file(run_dir: Path) -> bool:
    """Return whether a stop of the run is requested by a file."""
    return _exists(run_dir / STOP_NAME)


def remove_old_stop_file(run_dir: Path) -> None:
    """Remove a ``STOP`` file that is older than this start: the run that it was meant for has ended."""
    if _remove(run_dir / STOP_NAME):
        import logging

        logging.getLogger(__name__).info("removed %s, which is older than this start", run_dir / STOP_NAME)


def _exists(path: Path | None) -> bool:
    """Return whether the file exists, False if the disk fails; ``Path.exists`` would raise."""
    return path is not None and os.path.exists(path)


def _remove(path: Path | None) -> bool:
    """Remove the file; return False if that fails, so that a ``SAVE`` file does not cause a checkpoint every step."""
    try:
        if path is not None:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
