"""Layer-wise rates: who learns how fast, and who decays; without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from streamtrain.config.engine import OptimConfig

_BLOCK = re.compile(r"^backbone\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class GroupRule:
    """How a parameter departs from the run's learning rate and weight decay."""

    lr_factor: float
    decays: bool
    last_layer: bool
    backbone: bool


def rule_of(name: str, num_dims: int, depth: int, config: OptimConfig) -> GroupRule:
    """The rule of one parameter, from its name and number of dimensions.

    The factor is ``layer_decay`` to the power of the number of layers above the parameter: the heads and
    the final norm have 1, the last block has 1 above it, the embedding all ``depth + 1``. Vectors (biases, norms,
    LayerScale) do not decay.
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
