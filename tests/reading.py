"""Operations that read a tensor's values back to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RefuseReading(TorchDispatchMode):
    """Fails at what a GPU would have to be waited for."""

    READING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "is_nonzero", "_unique2")

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        assert name not in self.READING, f"{name} reads a value"
        if name.startswith("index"):
            given = [each for each in args[1] if each is not None] if isinstance(args[1], list | tuple) else []
            assert not any(each.dtype in (torch.bool, torch.uint8) for each in given), f"{name} counts a mask"
        return operation(*args, **(kwargs or {}))
