"""Handle Ctrl-C and SIGTERM outside the steps of a training run: one line and an exit status, never a traceback.

Imports almost nothing, so that a command can call it before its slow imports.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import FrameType, TracebackType

from streamtrain.run.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED

# from a signal until the process ends even if the main thread does not react
GRACE_SECONDS = 5.0
_TRAINING_STATUSES = {
    signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_PREEMPTED, signal.SIGUSR1: EXIT_PREEMPTED,
}  # fmt: skip

_TRACKER_WARNING = "ignore::UserWarning:multiprocessing.resource_tracker"

Handler = Callable[[int, FrameType | None], None]


class _State:
    """State of the process; global, because its signal handlers are."""

    received = 0
    is_reported = False


def raise_on_interrupt() -> Callable[[], None]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt in the main thread, and return a function that undoes this.

    A thread ends the process if it still runs ``GRACE_SECONDS`` later, because Python runs handlers only between
    instructions of the main thread and a library may drop the exception. A second signal ends it at once.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _State.received += 1
        if _State.received > 1:
            _end(EXIT_INTERRUPTED)
        raise KeyboardInterrupt

    _State.received, _State.is_reported = 0, False
    # Python's resource tracker warns of each semaphore that it frees after a process has exited at once
    if _TRACKER_WARNING not in sys.warnoptions:
        sys.warnoptions.append(_TRACKER_WARNING)
    # a shell starts background jobs with Ctrl-C ignored
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    return _listen(dict.fromkeys(numbers, EXIT_INTERRUPTED), interrupt, GRACE_SECONDS)


def exit_on_interrupt() -> Callable[[], None]:
    """Let Ctrl-C, SIGTERM and SIGUSR1 end the process at once, and return a function that undoes this.

    For the start of a training run, before there is anything to save. ``signals.Requests`` replaces these handlers.
    """
    undo = _listen(_TRAINING_STATUSES, lambda number, frame: None, 0.0)
    # cli/launch.py starts ranks with Ctrl-C blocked, because Python would print a traceback until now
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return undo


def end_quietly_on_interrupt() -> None:
    """Exit without a traceback on an uncaught KeyboardInterrupt.

    For a process that ends after its command: the exception may arise in a destructor or while Python exits.
    """
    report_error, report_ignored = sys.excepthook, sys.unraisablehook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if was_interrupted() or issubclass(kind, KeyboardInterrupt):
            _end(EXIT_INTERRUPTED)
        report_error(kind, error, trace)

    def unraisablehook(ignored: sys.UnraisableHookArgs) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            _end(EXIT_INTERRUPTED)
        report_ignored(ignored)

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook


def was_interrupted() -> bool:
    """Return whether a signal has arrived since ``raise_on_interrupt``; later errors are consequences of it."""
    return _State.received > 0


def report(line: str = "interrupted") -> None:
    """Write one line to stderr, unless one has been written."""
    if not _State.is_reported:
        _State.is_reported = True
        with suppress(OSError, ValueError):
            # a progress bar leaves the cursor at the end of its line
            os.write(2, f"{line}\n".encode() if not os.isatty(2) else f"\r\033[K{line}\n".encode())


def _listen(statuses: Mapping[signal.Signals, int], handler: Handler, grace_seconds: float) -> Callable[[], None]:
    """Install ``handler``, and a thread that ends the process with the status of the first signal after a time."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None  # only the main thread may install handlers
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    descriptor_before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handler) for number in statuses}
    threading.Thread(target=_watch, args=(receiver, statuses, grace_seconds), name="interrupts", daemon=True).start()

    def undo() -> None:
        signal.set_wakeup_fd(descriptor_before)
        for number, previous in before.items():
            signal.signal(number, previous)
        os.close(sender)

    return undo


def _watch(receiver: int, statuses: Mapping[signal.Signals, int], grace_seconds: float) -> None:
    """End the process after ``grace_seconds`` from the first signal, or at the second one."""
    poll = select.poll()
    poll.register(receiver, select.POLLIN)
    status, deadline = 0, 0.0
    while True:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000 if status else None):
            _end(status)
        numbers = os.read(receiver, 64)
        if not numbers:
            os.close(receiver)
            return
        for number in numbers:
            if number in statuses:
                if status:
                    _end(status)
                status, deadline = statuses[signal.Signals(number)], time.monotonic() + grace_seconds


def _end(status: int) -> None:
    """End the process and its worker processes at once; rank 0 writes a line for all ranks."""
    rank = "" if os.environ.get("WORLD_SIZE", "1") == "1" else os.environ.get("RANK", "")
    # a launcher sends SIGTERM to the other ranks of a failed one, whose error is already shown
    if rank == "" or (rank == "0" and status == EXIT_INTERRUPTED):
        report("interrupted" if status == EXIT_INTERRUPTED else "stopped before the first step")
    for process in list(_descendants(os.getpid())):
        with suppress(OSError):
            os.kill(process, signal.SIGTERM)
    os._exit(status)


def _descendants(process: int) -> Iterator[int]:
    """Yield the processes that this one has started: workers, compilers, and their own."""
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children", "rb") as file:
                for child in map(int, file.read().split()):
                    yield child
                    yield from _descendants(child)
