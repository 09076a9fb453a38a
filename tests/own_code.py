"""Code of a user: augmentations and backbones, named in settings as ``own_code:NAME``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from streamtrain.config.model import ModelConfig
from streamtrain.model.layers import Block, LayerNorm, Linear
from streamtrain.model.vit import VisionTransformer

calls = itertools.count()


def invert(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Invert some of the crops, in place, and add noise that differs between pixels."""
    for crop in crops:
        if torch.rand((), generator=generator) < 0.5:
            crop.copy_(255 - crop)
    return crops ^ torch.randint(0, 4, crops.shape, dtype=torch.uint8, generator=generator).to(crops.device)


def transpose(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Return a view of the crops."""
    return crops.transpose(2, 3)


def to_float(crops: Tensor, generator: torch.Generator) -> Tensor:
    return crops.float()


def to_list(crops: Tensor, generator: torch.Generator) -> list[Tensor]:
    return list(crops)


def cut(crops: Tensor, generator: torch.Generator) -> Tensor:
    return crops[:, :, 1:]


def draw_globally(crops: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, crops.shape, dtype=torch.uint8)


def count_calls(crops: Tensor, generator: torch.Generator) -> Tensor:
    return crops + next(calls) % 7


def fail(crops: Tensor, generator: torch.Generator) -> Tensor:
    raise IndexError("no such\ncrop \x1b[31m")  # line 52


def leave(crops: Tensor, generator: torch.Generator) -> Tensor:
    raise SystemExit(0)


def takes_no_generator(crops: Tensor) -> Tensor:
    return crops


NUMBER = 3


class GatedBlock(Block):
    """A block whose input passes through a gate with a norm of its own."""

    def __init__(self, config: ModelConfig, *options: Any) -> None:
        super().__init__(config, *options)
        self.gate_norm = LayerNorm(config.dim)
        self.gate = Linear(config.dim, config.dim)

    def forward(self, tokens: Tensor, *inputs: Any) -> Tensor:
        return super().forward(tokens * torch.sigmoid(self.gate(self.gate_norm(tokens))), *inputs)


class Backbone(VisionTransformer):
    """Blocks with a gate."""

    def __init__(
        self, config: ModelConfig, checkpointing: str = "none", view_groups: int = 1, offload: bool = False
    ) -> None:
        super().__init__(config, checkpointing, view_groups, offload)
        recompute = checkpointing == "selective"
        self.blocks = nn.ModuleList([GatedBlock(config, recompute, view_groups) for _ in range(config.depth)])

    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        if name.endswith("gate_norm.weight"):
            return torch.ones(shape)
        if name.endswith("gate.weight"):
            return torch.randn(shape, generator=generator)
        return None


class Shallow(Backbone):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.blocks = self.blocks[:-1]


class WithParameter(Backbone):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.factor = nn.Parameter(torch.ones(3))


class WithBuffer(Backbone):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.norm.register_buffer("mean", torch.zeros(3), persistent=False)


class Frozen(Backbone):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.norm.requires_grad_(False)


class Tied(Backbone):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.blocks[1].norm1.weight = self.blocks[0].norm1.weight


class OtherBlocks(Backbone):
    def __init__(self, config: ModelConfig, *options: Any) -> None:
        super().__init__(config, *options)
        self.blocks = nn.ModuleList([nn.Linear(config.dim, config.dim) for _ in range(config.depth)])


class Failing(Backbone):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.norm = self.nothing


class WithoutRule(Backbone):
    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        return None


class WrongValue(Backbone):
    def initial_value(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        return torch.zeros(2, 2, 2)


def not_a_backbone(config: ModelConfig, *options: Any) -> nn.Module:
    return nn.Linear(2, 2)
