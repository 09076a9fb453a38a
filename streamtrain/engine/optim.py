"""Parameter groups with layer-wise learning rates, and the optimiser that steps them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from streamtrain.config.engine import OptimConfig

_BLOCK = re.compile(r"^backbone\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class GroupRule:
    """How a parameter departs from the run's learning rate and weight decay."""

    lr_factor: float
    decays: bool
    last_layer: bool


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
    return GroupRule(factor, num_dims > 1, name.endswith("prototypes.weight"))


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], depth: int, config: OptimConfig
) -> list[dict[str, Any]]:
    """Optimiser groups, one a distinct rule, in the order of first appearance.

    Shapes are read from ``ds_shape`` where ZeRO-3 has partitioned the parameter.
    """
    groups: dict[GroupRule, list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups.setdefault(rule_of(name, len(shape), depth, config), []).append(parameter)
    return [{"params": parameters, "rule": rule} for rule, parameters in groups.items()]


def build_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in one fused pass a group; the learning rate is set before each step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)


def set_rates(
    groups: list[dict[str, Any]], lr: float, weight_decay: float, last_layer_frozen: bool
) -> None:
    """Write this step's learning rate and weight decay into every group."""
    for group in groups:
        rule: GroupRule = group["rule"]
        frozen = rule.last_layer and last_layer_frozen
        group["lr"] = 0.0 if frozen else lr * rule.lr_factor
        group["weight_decay"] = weight_decay if rule.decays else 0.0
