"""What a rank receives in collective operations, and how long it waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

GATHERS = ("all_gather_into_tensor", "all_gather")
OTHERS = ("reduce_scatter_tensor", "reduce_scatter", "all_reduce", "reduce", "broadcast")


class Traffic:
    """Counts from ``reset`` on; to be made before the engine looks its collectives up."""

    def __init__(self) -> None:
        self.reset()
        for name in (*GATHERS, *OTHERS):
            setattr(dist, name, self._timed(getattr(dist, name), name in GATHERS))

    def reset(self) -> None:
        """Forget what was counted."""
        self.gathered_bytes = 0
        # calling and waiting; on a GPU what the host waits, which overlap hides or not
        self.seconds = 0.0

    def _timed(self, collective: Callable[..., Any], gathers: bool) -> Callable[..., Any]:
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
            return handle if handle is None else _Waiting(handle, self)

        return call


class _Waiting:
    """A handle whose waiting is timed."""

    def __init__(self, handle: Any, traffic: Traffic) -> None:
        self._handle, self._traffic = handle, traffic

    def wait(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = self._handle.wait(*arguments)
        self._traffic.seconds += time.perf_counter() - started
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
