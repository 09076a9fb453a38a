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
    """Block SIGINT. Processes started inside inherit this, so only the parent handles Ctrl-C, after the block."""
    resource_tracker.ensure_running()  # starting it inside would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Exit when the parent dies; an orphan would wait for tasks forever."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
