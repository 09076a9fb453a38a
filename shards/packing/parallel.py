"""A function over many tasks in worker processes: results in order, a bounded number of tasks ahead."""

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

from shards.errors import ShardError

_TASKS_AHEAD = 3  # for each worker

Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """``function`` of each task, in order. Close the generator to stop early.

    Args:
        function: a picklable function, or a ``functools.partial`` of one.
        workers: processes; 1 works in this one.

    Raises:
        ShardError: a worker died.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    # A fresh interpreter for each worker: forking a process that may hold threads and locks is not safe.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            with _interrupts_held_back():  # any of the first tasks may start a worker
                pending.append(pool.submit(function, task))
            if len(pending) > _TASKS_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ShardError("a worker process died, most likely for want of memory; use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes that are started in here never see Ctrl-C: it is the parent's affair, which hears of it afterwards."""
    resource_tracker.ensure_running()  # starting it would let interrupts through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """Never outlive the parent: an orphan would wait for work for ever."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
