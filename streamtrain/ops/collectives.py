"""Collectives that do nothing in a single process."""

from __future__ import annotations

from typing import Any

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


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate ``rows [n, dim]`` (the same n) of all ranks in rank order, differentiably."""
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = rows.shape[0]
        pieces = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(pieces, rows.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # the losses of all ranks contribute to the gradient of this rank's rows
        gradient = sum_over_ranks(grad_outputs[0].contiguous())
        start = dist.get_rank() * ctx.num_rows
        return gradient[start : start + ctx.num_rows]
