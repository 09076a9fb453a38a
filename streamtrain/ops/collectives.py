"""Collectives that do nothing in a single process."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum in place over all ranks."""
    if world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.SUM)
    return value


def max_over_ranks(value: Tensor) -> Tensor:
    """Take the maximum in place over all ranks."""
    if world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate ``rows [n, dim]`` (the same n) of all ranks of a group in rank order, differentiably.

    Args:
        group: None: all ranks.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, group)
    return gathered


# by the group of all ranks and the number of ranks
_consecutive: WeakKeyDictionary[dist.ProcessGroup, dict[int, dist.ProcessGroup]] = WeakKeyDictionary()


def consecutive_ranks(count: int, timeout_seconds: float) -> dist.ProcessGroup | None:
    """Return the group of this rank when all ranks are divided into groups of ``count`` consecutive ones.

    Its ranks must call this at the same time; it is made once. None: all ranks.
    """
    if count == world_size():
        return None
    everyone = dist.group.WORLD
    assert everyone is not None
    groups = _consecutive.setdefault(everyone, {})
    if count not in groups:
        first = dist.get_rank() // count * count
        groups[count] = dist.new_group(
            range(first, first + count),
            timeout=timedelta(seconds=timeout_seconds),
            # ranks of other groups need not take part
            use_local_synchronization=True,
        )
    return groups[count]


class FailedOnOtherRank(Exception):
    """Work that all ranks do failed on another rank."""


class SharedFailure:
    """Runs work that fails on all ranks if it fails on one, so that no rank waits for a failed one in a collective."""

    def __init__(self, timeout_seconds: float) -> None:
        """``timeout_seconds``: how long a rank waits for the others."""
        # a separate group, so that these messages never mix with the messages of the work
        timeout = timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of ``work``, which uses no collectives; every rank calls this.

        Raises:
            Exception: that of ``work``, if it failed on this rank.
            FailedOnOtherRank: if it failed on another rank only.
        """
        try:
            result = work(*arguments)
        except Exception:
            self.has_occurred(True)
            raise
        if self.has_occurred(False):
            raise FailedOnOtherRank
        return result

    def has_occurred(self, here: bool) -> bool:
        """Return whether any rank failed; ``here``: whether this rank failed."""
        if self._group is None:
            return here
        flag = torch.tensor(float(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.num_rows, ctx.group = rows.shape[0], group
        pieces = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, rows.contiguous(), group)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # the losses of all ranks of the group contribute to the gradient of this rank's rows
        gradient = grad_outputs[0].contiguous()
        dist.all_reduce(gradient, dist.ReduceOp.SUM, ctx.group)
        start = dist.get_rank(ctx.group) * ctx.num_rows
        return gradient[start : start + ctx.num_rows], None
