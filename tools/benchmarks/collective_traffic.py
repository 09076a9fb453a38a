"""Bytes that a rank receives in collective operations, and the time it spends in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

GATHERS = ("all_gather_into_tensor", "all_gather")
OTHERS = ("reduce_scatter_tensor", "reduce_scatter", "all_reduce", "reduce", "broadcast")


class Traffic:
    """Counters since the last ``reset``; create it before the engine imports its collectives."""

    def __init__(self) -> None:
        self.reset()
        for name in (*GATHERS, *OTHERS):
            setattr(dist, name, self._wrap(getattr(dist, name), name in GATHERS))

    def reset(self) -> None:
        """Set all counters to zero."""
        self.gathered_bytes = 0
        # time in calls and waits; on a GPU this is host time, whether or not computation overlaps it
        self.seconds = 0.0

    def _wrap(self, collective: Callable[..., Any], gathers: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if gathers:
                output = arguments[0] if arguments else named.get("output_tensor", named.get("tensor_list"))
                assert output is not None
                whole = sum(t.nbytes for t in output) if isinstance(output, list) else output.nbytes
                ranks = dist.get_world_size(named.get("group"))
                self.gathered_bytes += whole * (ranks - 1) // ranks
            started = time.perf_counter()
            handle = collective(*arguments, **named)
            self.seconds += time.perf_counter() - started
            return handle if handle is None else _TimedHandle(handle, self)

        return call


class _TimedHandle:
    """An asynchronous handle that adds the time of its ``wait`` to the counters."""

    def __init__(self, handle: Any, traffic: Traffic) -> None:
        self._handle, self._traffic = handle, traffic

    def wait(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = self._handle.wait(*arguments)
        self._traffic.seconds += time.perf_counter() - started
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
