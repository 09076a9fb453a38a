"""Run a test's function in several processes that form a gloo process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(work: Callable[..., None], folder: Path, *arguments: object, ranks: int = 2) -> None:
    """Run ``work(rank, *arguments)`` in ``ranks`` processes of one gloo group."""
    shared = (ranks, str(folder / "rendezvous"), work, arguments)
    # forked, because a spawned process would import torch again, which takes longer than most tests
    mp.start_processes(_run_in_group, shared, nprocs=ranks, start_method="fork")


def _run_in_group(
    rank: int, ranks: int, rendezvous: str, work: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()
