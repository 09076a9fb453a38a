"""Logits of features against prototypes, a chunk of prototypes at a time, always in fp32 (or fp64).

``scaled_logits`` and ``row_log_sum_exp`` run CPU kernels where ``uses_kernels``, otherwise PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamtrain.ops.chunks import chunks
from streamtrain.ops.cpu.build import is_enabled


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and sums: fp64 for fp64 features, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Buffer:
    """Memory for ``num_rows`` rows of at most ``chunk`` values, reused by all chunks.

    On a CPU the first touch of new memory costs as much as several passes over it.
    """

    def __init__(self, num_rows: int, chunk: int, like: Tensor) -> None:
        self._num_rows = num_rows
        self._values = torch.empty(num_rows * chunk, dtype=accumulator(like.dtype), device=like.device)

    def view(self, part: slice) -> Tensor:
        """Return contiguous ``[num_rows, size of the part]`` with undefined values."""
        size = part.stop - part.start
        return self._values[: self._num_rows * size].view(self._num_rows, size)


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``left @ right`` accumulated and stored in fp32 (fp64), since 16-bit logits make a softmax inexact."""
    if left.is_cuda and left.dtype not in (torch.float32, torch.float64):
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    wide = accumulator(left.dtype)
    return torch.mm(left.to(wide), right.to(wide), out=out)


def uses_kernels(*pairs: tuple[Tensor, Tensor]) -> bool:
    """Return whether the CPU kernels compute the logits of these bottlenecks ``[N, d]`` and prototypes ``[K, d]``."""
    return (
        all(each.device.type == "cpu" and each.dtype == pairs[0][0].dtype for pair in pairs for each in pair)
        and all(features.shape[1] % 32 == 0 for features, _ in pairs)
        and is_enabled(pairs[0][0].dtype)
    )


def scaled_logits(
    features: Tensor, weight: Tensor, temperature: float, column: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return ``features @ weight.T / temperature + column``."""
    if uses_kernels((features, weight)):
        logits = torch.empty(features.shape[0], weight.shape[0]) if out is None else out
        torch.ops.streamtrain.logits(features.contiguous(), weight.contiguous(), temperature, column, logits)
        return logits
    if features.dtype in (torch.float32, torch.float64):
        bias, beta = (features.new_empty(()), 0.0) if column is None else (column, 1.0)
        return torch.addmm(bias, features, weight.T, beta=beta, alpha=1.0 / temperature, out=out)
    logits = matmul(features, weight.T, out).div_(temperature)
    return logits if column is None else logits.add_(column)


class RowLogSumExp:
    """Log-sum-exp of each row over consecutive chunks."""

    def __init__(self, num_rows: int, like: Tensor) -> None:
        shape = (num_rows,)
        self.maximum = torch.full(shape, -torch.inf, dtype=accumulator(like.dtype), device=like.device)
        self.sum = torch.zeros_like(self.maximum)

    def add(self, logits: Tensor) -> None:
        """Add ``logits [num_rows, chunk]``, which are overwritten."""
        maximum = torch.maximum(self.maximum, logits.amax(1))
        # for a row that is −inf so far: −inf − −inf would be NaN
        shift = maximum.nan_to_num(neginf=0.0)
        self.sum = self.sum * (self.maximum - shift).exp() + logits.sub_(shift[:, None]).exp_().sum(1)
        self.maximum = maximum

    def value(self) -> Tensor:
        """Return ``[num_rows]``; −inf for a row of only −inf."""
        return self.maximum + self.sum.log()


def row_log_sum_exp(
    features: Tensor, weight: Tensor, temperature: float, chunk: int, column: Tensor | None = None
) -> Tensor:
    """Return ``[num_rows]``: log-sum-exp of each row of ``features @ weight.T / temperature + column``."""
    if uses_kernels((features, weight)):
        return torch.ops.streamtrain.row_log_sum_exp(features.contiguous(), weight.contiguous(), temperature, column)
    streaming, buffer = RowLogSumExp(features.shape[0], features), Buffer(features.shape[0], chunk, features)
    for part in chunks(weight.shape[0], chunk):
        scale = None if column is None else column[part]
        streaming.add(scaled_logits(features, weight[part], temperature, scale, buffer.view(part)))
    return streaming.value()
