"""Initial values by explicit rules on a parameter's name: the same for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shards.randomness import INITIALISE, derive_seed
from streamtrain.config.model import ModelConfig
from streamtrain.config.user_code import describe_failure
from streamtrain.errors import UserCodeError
from streamtrain.model.vit import VisionTransformer

# For linear weights, tokens and prototypes. The published truncation at 100 standard deviations has no effect.
STANDARD_DEVIATION = 0.02


def initial_value(
    name: str, shape: Sequence[int], config: ModelConfig, seed: int, backbone: VisionTransformer | None = None
) -> Tensor:
    """Return the initial value of parameter ``name`` of a ``SSLModel`` or a backbone: fp32, on the CPU.

    It depends only on the arguments; a leading ``backbone.`` is ignored.

    Args:
        backbone: of ``model.factory``; its ``initial_value`` precedes the rules.

    Raises:
        ValueError: for a name that no rule covers; with ``model.factory``, UserCodeError.
    """
    is_of_backbone = name.startswith("backbone.")
    name = name.removeprefix("backbone.")
    if config.factory is not None and backbone is not None and is_of_backbone:
        own = _own_initial_value(name, torch.Size(shape), config, seed, backbone)
        if own is not None:
            return own
    parent, _, last = name.rpartition(".")
    if last in ("bias", "mask_token", "lora_b"):
        return torch.zeros(*shape)
    if last == "gamma":
        return torch.full(tuple(shape), config.layerscale)
    if last == "weight" and parent.rpartition(".")[2] in ("norm", "norm1", "norm2", "cls_norm", "local_norm"):
        return torch.ones(*shape)
    generator = _generator(name, seed)
    if name == "embedding.projection.weight" or last == "lora_a":
        # torch's default for a convolution, whose scale depends on the patch size, and for a linear layer
        bound = shape[1] ** -0.5
        return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
    # a vector called weight belongs to a norm of unknown name
    if last in ("weight", "cls_token", "register_tokens") and len(shape) > 1:
        return torch.empty(*shape).normal_(0.0, STANDARD_DEVIATION, generator=generator)
    if config.factory is not None:
        raise UserCodeError(
            f"model.factory={config.factory}: no rule for the initial value of the parameter {name}; return it from "
            "the method initial_value(name, shape, generator)"
        )
    raise ValueError(f"no rule for the initial value of parameter {name!r}")


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(derive_seed(seed, INITIALISE, int.from_bytes(digest, "little")))


def _own_initial_value(
    name: str, shape: torch.Size, config: ModelConfig, seed: int, backbone: VisionTransformer
) -> Tensor | None:
    """Return the value from the network of ``model.factory``, fp32, or None if it leaves it to the rules."""
    what = f"model.factory={config.factory}: initial_value of the parameter {name}"
    try:
        value = backbone.initial_value(name, shape, _generator(name, seed))
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{what} failed: {describe_failure(error, type(backbone).initial_value)}") from error
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.shape != shape:
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserCodeError(f"{what} must be a tensor {list(shape)}, not {given}")
    return value.detach().to("cpu", torch.float32)


@torch.no_grad()
def initialise(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a plain (unsharded) module in place."""
    backbone = getattr(module, "backbone", None)
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed, backbone))
