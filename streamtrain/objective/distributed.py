"""Collectives that do nothing where there is one process."""

from __future__ import annotations

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
