"""The optimiser, its parameter groups, and their learning rates and weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from streamtrain.config.engine import OptimConfig
from streamtrain.engine.deepspeed_compat import full_shape
from streamtrain.engine.moments import Moments
from streamtrain.planning.parameter_groups import GroupRule, rule_of


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], depth: int, config: OptimConfig
) -> list[dict[str, Any]]:
    """Return optimiser groups, one per distinct rule, in the order of first appearance."""
    groups: dict[GroupRule, list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        rule = rule_of(name, len(full_shape(parameter)), depth, config)
        groups.setdefault(rule, []).append(parameter)
    return [{"params": parameters, "rule": rule} for rule, parameters in groups.items()]


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with configurable moment storage; call ``set_rates`` before each step."""

    def __init__(
        self, groups: list[dict[str, Any]], config: OptimConfig, make_moments: Callable[[Tensor], Moments]
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "betas": config.betas, "eps": config.eps})
        self._make_moments = make_moments
        # a scalar that step() divides gradients by, in place
        self.divisor: Tensor | None = None

    def moments(self, parameter: Tensor) -> Moments | None:
        """Return the moments of a flat parameter; None before its first update."""
        state = self.state.get(parameter)
        return state["moments"] if state else None

    def create_moments(self, parameter: Tensor, steps: int) -> Moments:
        """Create zero moments of a flat parameter and set its number of updates to ``steps``."""
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
                moments = self.moments(parameter) or self.create_moments(parameter, 0)
                step = self.state[parameter]["step"]
                for part, (first, second) in moments.staged():
                    adamw(
                        [parameter[part]], [parameter.grad[part]], [first], [second], [],
                        # a copy, because each call increments its argument
                        [step.clone()],
                        grad_scale=self.divisor, fused=True, amsgrad=False, maximize=False, lr=group["lr"],
                        beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                        weight_decay=group["weight_decay"],
                    )  # fmt: skip
                step += 1


def set_rates(
    groups: list[dict[str, Any]], lr: float, weight_decay: float, last_layer_frozen: bool, backbone_frozen: bool = False
) -> None:
    """Set the learning rate and weight decay of every group for the next step."""
    for group in groups:
        rule: GroupRule = group["rule"]
        frozen = (rule.last_layer and last_layer_frozen) or (rule.backbone and backbone_frozen)
        group["lr"] = 0.0 if frozen else lr * rule.lr_factor
        group["weight_decay"] = weight_decay if rule.decays else 0.0
