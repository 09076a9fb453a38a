"""Map over tasks in worker processes, with results in order and a bounded number of tasks ahead."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import FrameType
from typing import TypeVar

from shards.errors import ShardError, explain_os_error

_TASKS_AHEAD = 3  # per worker

Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """Yield ``function(task)`` for each task, in order. Close the generator to stop early.

    Args:
        function: a picklable function, or a ``functools.partial`` of one.
        workers: number of processes; 1 uses the calling process.

    Raises:
        ShardError: a worker process died, or none can be started.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # spawn, because forking a process that may have threads and locks is unsafe
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            try:
                with _interrupts_blocked():  # any of the first tasks may start a worker
                    pending.append(pool.submit(function, task))
            except OSError as error:
                reason = explain_os_error(error)
                raise ShardError(f"worker processes cannot be started ({reason}); use fewer --workers") from error
            if len(pending) > _TASKS_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ShardError("a worker process died, most likely out of memory; use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Handle SIGINT and SIGTERM after the block, so that no worker is left half started.

    Workers started inside ignore Ctrl-C, because they inherit the mask. The mask alone does not protect the block:
    another thread may receive the signal, and Python then runs the handler in the main thread.
    """
    resource_tracker.ensure_running()  # starting it inside would unblock SIGINT
    received: list[int] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():  # only there may handlers be changed
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {int(number): handler for number, handler in found.items() if callable(handler)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: received.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for arrived in received:
            handlers[arrived](arrived, None)


def _start_worker() -> None:
    """Exit when the parent dies; an orphan would wait for tasks forever."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
