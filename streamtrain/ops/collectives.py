"""Collectives that do nothing in a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks of ``group`` (None: all), 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum in place over the ranks of ``group``."""
    if world_size(group) > 1:
        dist.all_reduce(value, dist.ReduceOp.SUM, group)
    return value


def max_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Take the maximum in place over the ranks of ``group``."""
    if world_size(group) > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return value


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate ``rows [n, dim]`` (the same n) of all ranks in rank order, differentiably."""
    if world_size(group) == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, group)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.num_rows = group, rows.shape[0]
        pieces = [torch.empty_like(rows) for _ in range(world_size(group))]
        dist.all_gather(pieces, rows.contiguous(), group)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # the losses of all ranks contribute to the gradient of this rank's rows
        gradient = sum_over_ranks(grad_outputs[0].contiguous(), ctx.group)
        start = dist.get_rank(ctx.group) * ctx.num_rows
        return gradient[start : start + ctx.num_rows], None
