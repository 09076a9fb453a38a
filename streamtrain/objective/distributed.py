"""Collectives that do nothing where there is one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of ``group`` (None: all), 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum in place over the ranks of ``group``."""
    if world_size(group) > 1:
        dist.all_reduce(value, dist.ReduceOp.SUM, group)
    return value


def max_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Maximum in place over the ranks of ``group``."""
    if world_size(group) > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return value


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Every rank's ``rows [n, dim]`` (the same n) in the order of ranks, differentiable in all of them."""
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
        # what the losses of all ranks ask of my rows
        gradient = sum_over_ranks(grad_outputs[0].contiguous(), ctx.group)
        start = dist.get_rank(ctx.group) * ctx.num_rows
        return gradient[start : start + ctx.num_rows], None
