"""Blocks as compiled kernels: what lies between the matrix products moves memory once instead of once an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamtrain.errors import ConfigError
from streamtrain.model.layers import Block

# Shapes that are met of one block: with and without a gradient, a chunk and what is left over, for each crop size; and
# of the last one, with the rows that are read of it. Beyond torch's own limit of 8 it would stop compiling.
MOST_SHAPES = 64


def compile_blocks(network: nn.Module) -> None:
    """From now on each block of ``network`` computes its branches compiled, for each shape that it meets.

    All blocks share what is compiled. The forward around it stays as it is: a sharded engine's hooks, which make the
    parameters whole, chunks, and what is computed again.
    """
    # takes two seconds to load
    from torch import _dynamo

    _dynamo.config.recompile_limit = MOST_SHAPES
    for block in network.modules():
        if isinstance(block, Block):
            # those for CPUs are whole branches, which leave nothing to compile
            block.kernels = False
            # numbers that differ from call to call must not make shapes variable
            for part in ("transform", "attend", "refine"):
                compiled = torch.compile(getattr(block, part), fullgraph=True, dynamic=False)
                setattr(block, part, _with_one_line(compiled))


def _with_one_line(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    def in_one_line(*arguments: Any) -> Tensor:
        try:
            return compiled(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            told = str(error).strip().partition("\n")[0]
            raise ConfigError(f"the blocks cannot be compiled here ({told}); set engine.compile=off") from error

    return in_one_line
