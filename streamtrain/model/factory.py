"""The backbone of a configuration: the built-in network, or a subclass of it that ``model.factory`` names."""

from __future__ import annotations

from functools import lru_cache

import torch

from streamtrain.config.model import ModelConfig
from streamtrain.config.user_code import describe_failure, load_user_code
from streamtrain.errors import UserCodeError
from streamtrain.model.layers import Block
from streamtrain.model.vit import VisionTransformer

KEY = "model.factory"
# those of VisionTransformer
ARGUMENTS = ("config", "checkpointing", "view_groups", "offload")


def build_backbone(
    config: ModelConfig, checkpointing: str = "none", view_groups: int = 1, offload: bool = False
) -> VisionTransformer:
    """Build the backbone; its values are undefined. Arguments as in ``VisionTransformer``.

    Raises:
        UserCodeError: if the network of ``model.factory`` cannot be built, or cannot be trained.
    """
    if config.factory is None:
        return VisionTransformer(config, checkpointing, view_groups, offload)
    what = f"{KEY}={config.factory}"
    factory = load_user_code(KEY, config.factory, ARGUMENTS)
    try:
        model = factory(config, checkpointing, view_groups, offload)
    except UserCodeError:
        raise
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{what} cannot be built: {describe_failure(error, factory)}") from error
    if fault := _find_fault(model, config):
        raise UserCodeError(f"{what} {fault}")
    return model


def _find_fault(model: object, config: ModelConfig) -> str | None:
    """Return why the trainer cannot use a network, or None."""
    if not isinstance(model, VisionTransformer):
        return f"returns a {type(model).__name__}, not a subclass of streamtrain.model.vit.VisionTransformer"
    if len(model.blocks) != config.depth:
        return f"has {len(model.blocks)} blocks, but model.depth is {config.depth}"
    if other := next((block for block in model.blocks if not isinstance(block, Block)), None):
        return f"has a block of type {type(other).__name__}, not a subclass of streamtrain.model.layers.Block"
    for name, value in (("patch_size", config.patch_size), ("num_prefix", 1 + config.num_registers)):
        if getattr(model, name) != value:
            return f"has {name} {getattr(model, name)}, but the settings of the model give {value}"
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        if "." not in name:
            return f"has the parameter {name} itself; move it to a submodule, whose forward uses it"
        if not parameter.requires_grad:
            return f"has the parameter {name} without gradient, which cannot be trained"
    if len({id(parameter) for parameter in named.values()}) < len(named):
        return "has a parameter under two names"
    if buffer := next((name for name, _ in model.named_buffers()), None):
        return f"has the buffer {buffer}, but only parameters are saved; compute it in forward"
    return None


@lru_cache
def backbone_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the backbone, in the order of ``named_parameters()``.

    Raises:
        UserCodeError: as in ``build_backbone``.
    """
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_backbone(config).named_parameters()}
