"""Clipping the gradient of each module (the backbone, each head) to a norm of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

# values whose squares are summed up in fp32, which holds them up to 1e19; the sums of such rows are in fp64
ROW = 2**14


class ModuleClipping:
    """Scales each module's gradient down to a norm of at most ``limit``, on shards.

    Every rank holds a part of each parameter's gradient, already averaged over ranks and micro-batches; the
    squares of all modules travel in one small all-reduce. DeepSpeed's own clipping must be off.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], limit: float) -> None:
        """``parameters``: by name; the part before the first dot names the module."""
        self._modules = sorted({name.partition(".")[0] for name in parameters})
        self._module_of = {id(p): self._modules.index(name.partition(".")[0]) for name, p in parameters.items()}
        self._limit = limit
        self._norms: torch.Tensor | None = None

    @torch.no_grad()
    def apply(self, gradients: Iterable[tuple[torch.nn.Parameter, torch.Tensor]]) -> torch.Tensor:
        """Clip in place: parameters, each with this rank's part of its gradient.

        Returns the sum of the modules' norms before, a scalar on their device.
        """
        parts: list[list[torch.Tensor]] = [[] for _ in self._modules]
        for parameter, gradient in gradients:
            parts[self._module_of[id(parameter)]].append(gradient)
        squares = torch.stack([squared_norm(of_module) for of_module in parts])
        dist.all_reduce(squares)
        self._norms = squares.sqrt().float()
        # as torch.nn.utils.clip_grad_norm_
        factors = (self._limit / (self._norms + 1e-6)).clamp_max(1.0)
        for of_module, factor in zip(parts, factors, strict=True):
            for gradient in of_module:
                gradient.mul_(factor)
        return self._norms.sum()

    def scalars(self) -> dict[str, float]:
        """Norms before the last clipping, by the tags they are logged under."""
        assert self._norms is not None, "no step yet"
        tag = "optim/gradient_norm"
        each = dict(zip(self._modules, self._norms.tolist(), strict=True))
        return {tag: float(self._norms.square().sum().sqrt()), **{f"{tag}/{name}": norm for name, norm in each.items()}}


def squared_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared L2 norm of fp32 ``gradients [numel]`` together, fp64, always summed in the same order."""
    norms = []
    for gradient in gradients:
        whole = len(gradient) // ROW * ROW
        norms += [torch.linalg.vector_norm(gradient[:whole].view(-1, ROW), dim=1)]
        norms += [torch.linalg.vector_norm(gradient[whole:])[None]]
    return torch.cat(norms).double().square().sum()
