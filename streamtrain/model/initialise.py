"""Initial values by explicit rules on a parameter's name: the same for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shards.randomness import INITIALISE, derive_seed
from streamtrain.config.model import ModelConfig

# For linear weights, tokens and prototypes. The published truncation at 100 standard deviations has no effect.
STANDARD_DEVIATION = 0.02


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Return the initial value of parameter ``name`` of a ``SSLModel`` or a backbone: fp32, on the CPU.

    It depends only on the arguments; a leading ``backbone.`` is ignored.

    Raises:
        ValueError: for a name that no rule covers.
    """
    name = name.removeprefix("backbone.")
    parent, _, last = name.rpartition(".")
    if last == "bias" or last == "mask_token":
        return torch.zeros(*shape)
    if last == "gamma":
        return torch.full(tuple(shape), config.layerscale)
    if last == "weight" and parent.rpartition(".")[2] in ("norm", "norm1", "norm2", "cls_norm", "local_norm"):
        return torch.ones(*shape)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(derive_seed(seed, INITIALISE, int.from_bytes(digest, "little")))
    if name == "embedding.projection.weight":
        # the default of a convolution, whose scale depends on the patch size
        bound = shape[1] ** -0.5
        return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
    if last in ("weight", "cls_token", "register_tokens"):
        return torch.empty(*shape).normal_(0.0, STANDARD_DEVIATION, generator=generator)
    raise ValueError(f"no rule for the initial value of parameter {name!r}")


@torch.no_grad()
def initialise(module: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a plain (unsharded) module in place."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed))
