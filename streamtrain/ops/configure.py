"""Process-wide settings of the operations on a CPU, chosen once at the start and equal on all ranks."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Largest total size of freed tensors that the kernels' allocator keeps for the next ones (``ops/cpu/memory.cpp``).
KEPT_BYTES = 2**30
# Parameters of mallopt from malloc.h. Smaller allocations stay with the process when they are freed.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, MAPPED_BYTES = -1, -3, 8 * 2**20


def tune_cpu_allocator() -> None:
    """Map large tensors in huge pages and return them to the system when freed (glibc on Linux; otherwise no-op).

    A step allocates and frees activations of tens of megabytes. By default each is mapped in small pages, whose first
    touch costs as much as a pass over them, or stays with the process. Call this before torch allocates anything.
    ``select_cpu_kernels`` replaces it with the kernels' own allocator.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def select_cpu_kernels(wanted: bool, dtype: torch.dtype) -> bool:
    """Use the CPU kernels on all ranks if all of them can, otherwise on none; return the choice.

    The ranks must agree because Sinkhorn's collectives differ with the kernels. Call this after the process group has
    been initialised.
    """
    import torch

    from streamtrain.ops.cpu.build import load, set_enabled

    chosen = torch.tensor(int(wanted and load(dtype)))
    torch.distributed.all_reduce(chosen, torch.distributed.ReduceOp.MIN)
    set_enabled(bool(chosen))
    if chosen:
        torch.ops.streamtrain.keep_memory(KEPT_BYTES)
    return bool(chosen)
