"""Parameter groups by their rules, and the optimiser that steps them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from streamtrain.config.engine import EngineConfig, OptimConfig
from streamtrain.engine.moments import (
    BLOCK,
    EightBitMoments,
    FileMoments,
    Moments,
    SplitMoments,
    TensorMoments,
    eight_bit_maps,
)
from streamtrain.planning.parameter_groups import GroupRule, rule_of


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


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) whose moments lie where the configuration says.

    The learning rate and weight decay are set before each step.
    """

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, make_moments: Callable[[Tensor], Moments]
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "betas": config.betas, "eps": config.eps})
        self._make_moments = make_moments
        # what gradients are divided by on the way into an update, and stay so, a scalar
        self.divisor: Tensor | None = None

    def moments(self, parameter: Tensor) -> Moments | None:
        """The moments of a flat parameter; None before its first update."""
        state = self.state.get(parameter)
        return state["moments"] if state else None

    def begin(self, parameter: Tensor, steps: int) -> Moments:
        """Fresh moments, all 0, of a parameter that has seen ``steps`` updates."""
        step = torch.full((), float(steps), dtype=torch.float32, device=parameter.device)
        moments = self._make_moments(parameter)
        self.state[parameter] = {"step": step, "moments": moments}
        return moments

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, in place."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                moments = self.moments(parameter) or self.begin(parameter, 0)
                step = self.state[parameter]["step"]
                for part, (first, second) in moments.staged():
                    adamw(
                        [parameter[part]], [parameter.grad[part]], [first], [second], [],
                        # counted up by each call
                        [step.clone()],
                        grad_scale=self.divisor, fused=True, amsgrad=False, maximize=False, lr=group["lr"],
                        beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                        weight_decay=group["weight_decay"],
                    )  # fmt: skip
                step += 1


def moments_maker(engine: EngineConfig, folder: Path, device: torch.device) -> Callable[[Tensor], Moments]:
    """How this rank makes the moments of a flat parameter; ``folder`` is its own, for files.

    Raises:
        ConfigError: if what ``engine.moments`` needs is not installed.
    """
    if engine.moments == "8bit":
        eight_bit_maps()
    count = itertools.count()

    def away(numel: int) -> Moments:
        if engine.moments == "8bit":
            return EightBitMoments(numel, device)
        if engine.moments == "disk":
            return FileMoments(numel, device, folder / f"{next(count):05d}")
        return TensorMoments(numel, device, torch.device("cpu") if engine.moments == "host" else device)

    def make(parameter: Tensor) -> Moments:
        kept = int((1.0 - engine.moments_ratio) * parameter.numel()) // BLOCK * BLOCK
        if not kept:
            return away(parameter.numel())
        return SplitMoments(TensorMoments(kept, device, device), away(parameter.numel() - kept))

    return make


def set_rates(
    groups: list[dict[str, Any]],
    lr: float,
    weight_decay: float,
    last_layer_frozen: bool,
    backbone_frozen: bool = False,
) -> None:
    """Write this step's learning rate and weight decay into every group."""
    for group in groups:
        rule: GroupRule = group["rule"]
        frozen = (rule.last_layer and last_layer_frozen) or (rule.backbone and backbone_frozen)
        group["lr"] = 0.0 if frozen else lr * rule.lr_factor
        group["weight_decay"] = weight_decay if rule.decays else 0.0
