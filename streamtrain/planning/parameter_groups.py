"""Layer-wise learning rates and weight decay, without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from streamtrain.config.engine import OptimConfig

_BLOCK = re.compile(r"^backbone\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class GroupRule:
    """The learning rate multiplier and the weight decay of a parameter, and which schedules may freeze it."""

    lr_factor: float
    decays: bool
    last_layer: bool
    backbone: bool


def rule_of(name: str, num_dims: int, depth: int, config: OptimConfig) -> GroupRule:
    """Return the rule of one parameter, given its name and number of dimensions.

    The multiplier is ``layer_decay ** n``, where n is the number of layers above the parameter: 0 for heads and final
    norms, 1 for the last block, ``depth + 1`` for the embedding (patch projection and tokens). Vectors (biases, norms,
    LayerScale) have no weight decay; matrices and the tokens ``[n, dim]`` have it.
    """
    block = _BLOCK.match(name)
    if block:
        above = depth - int(block.group(1))
    else:
        above = depth + 1 if name.startswith("backbone.embedding.") else 0
    factor = config.layer_decay**above
    if name.startswith("backbone.embedding.projection."):
        factor *= config.patch_embed_lr
    return GroupRule(factor, num_dims > 1, name.endswith("prototypes.weight"), name.startswith("backbone."))
