"""Detect operations that copy a tensor's values to the host, which would sync on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ForbidHostSyncs(TorchDispatchMode):
    """Raise on every operation that needs a value on the host."""

    SYNCING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "is_nonzero", "_unique2")

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        assert name not in self.SYNCING, f"{name} copies a value to the host"
        if name.startswith("index"):
            indices = [each for each in args[1] if each is not None] if isinstance(args[1], list | tuple) else []
            assert not any(each.dtype in (torch.bool, torch.uint8) for each in indices), f"{name} counts a mask"
        return operation(*args, **(kwargs or {}))


@contextmanager
def cuda_syncs_raise() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
