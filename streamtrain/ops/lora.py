"""Low-rank adapters of linear layers (Hu et al. 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Adapter(NamedTuple):
    """An adapter, which adds ``scale * rows @ a.T @ b.T`` to the output of a linear layer."""

    # [rank, inputs]
    a: Tensor
    # [outputs, rank]
    b: Tensor
    scale: float

    def add_to(self, output: Tensor, rows: Tensor) -> Tensor:
        """Add to ``output [N, outputs]``, in place, the adapter's output for ``rows [N, inputs]``."""
        # scaling the narrow [N, rank] matrix and accumulating in addmm_ avoids a second [N, outputs]
        return output.addmm_(F.linear(rows, self.a) * self.scale, self.b.t())


@torch.no_grad()
def merge(weight: Tensor, adapter: Adapter) -> Tensor:
    """Return ``weight [outputs, inputs]`` of a linear layer with the adapter added, in fp32."""
    return torch.addmm(weight.float(), adapter.b.float(), adapter.a.float(), alpha=adapter.scale)
