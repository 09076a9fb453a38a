"""Transformer blocks compiled by torch.compile, which fuses the memory-bound operations between the matmuls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from streamtrain.errors import ConfigError
from streamtrain.model.layers import Block

# Input shapes of a block: with and without gradients, a whole and a partial chunk for each crop size, and for the last
# block its output rows. torch's own limit of 8 is too low.
MAX_SHAPES = 64


def compile_blocks(network: nn.Module) -> None:
    """Compile the branches of each block of ``network``, once per input shape for all blocks.

    The forward around the branches stays eager: the sharded engine's hooks, chunks and activation checkpointing.
    """
    # the import takes two seconds
    from torch import _dynamo

    _dynamo.config.recompile_limit = MAX_SHAPES
    for block in network.modules():
        if isinstance(block, Block):
            # the CPU kernels are whole branches, which leave nothing to compile
            block.options = replace(block.options, implementation="reference")
            # dynamic=False: sizes that differ between calls must not become symbolic
            for part in ("transform", "attend", "refine"):
                compiled = torch.compile(getattr(block, part), fullgraph=True, dynamic=False)
                setattr(block, part, _with_short_error(compiled))


def _with_short_error(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    def run(*arguments: Any) -> Tensor:
        try:
            return compiled(*arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"the blocks cannot be compiled here ({reason}); set engine.compile=off") from error

    return run
