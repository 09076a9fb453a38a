"""This rank's parts of parameters; checkpoints use them too, so DeepSpeed is not imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from streamtrain.engine import deepspeed_compat


@dataclass(frozen=True)
class Fragment:
    """A part of one flattened parameter: its values ``[start, stop)``, padded to ``numel``."""

    shape: tuple[int, ...]
    start: int
    stop: int
    numel: int

    @classmethod
    def of(cls, parameter: Parameter, rank: int) -> Fragment:
        """Return the fragment of a ZeRO-3 parameter that ``rank`` owns."""
        numel, full = deepspeed_compat.shard_numel(parameter), deepspeed_compat.full_numel(parameter)
        start = min(rank * numel, full)
        return cls(tuple(deepspeed_compat.full_shape(parameter)), start, min(start + numel, full), numel)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """Return this fragment of a parameter's full ``values``, ``[numel]``, zero-padded; a view if unpadded."""
        part = values.reshape(-1)[self.start : self.stop]
        padding = self.numel - part.numel()
        return torch.nn.functional.pad(part, (0, padding)) if padding else part


@dataclass(frozen=True)
class Shard:
    """``numel`` fp32 values of this rank, computed when they are read."""

    numel: int
    read: Callable[[], torch.Tensor]
