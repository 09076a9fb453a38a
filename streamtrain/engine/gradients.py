"""Gradients between the backward pass and the update: accumulation, norms and clipping, in place on this rank's shards.

DeepSpeed 0.19 keeps a rank's gradients in one flat fp32 tensor but reads or writes all of them about ten times a step:
two bucket copies, division by the number of ranks, reduction, conversion to fp32 and a copy; for the update another
conversion, the norm, flattening into new memory and scaling. Here each gradient is written to its final position, then
read once for the norm and once for the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from streamtrain.engine.deepspeed_compat import Stage3Optimizer, shard_numel, unsupported
from streamtrain.engine.optim import AdamW

# squares are summed in fp32 within rows of this many values, and the row sums in fp64
ROW = 2**14


class FlatGradients:
    """This rank's gradient shards, fp32, summed over the micro-batches of a step.

    Replaces the methods of DeepSpeed's optimiser that store gradients, compute their norm, and prepare and clip an
    update.
    """

    def __init__(self, stage3: Stage3Optimizer, adamw: AdamW) -> None:
        """``adamw`` applies the clipping factor while it reads the gradient."""
        self._stage3, self._adamw = stage3, adamw
        flat = stage3.flat_gradients
        assert flat.dtype == torch.float32
        sizes = {id(p): shard_numel(p) for group in stage3.groups for p in group}
        self._shards = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        self._groups = flat.split([sum(sizes[id(p)] for p in group) for group in stage3.groups])
        # ids of the parameters that have a gradient in this step
        self._present: set[int] = set()
        stage3.replace_gradient_path(
            store_partitions=self._store_partitions,
            store_whole=self._store_whole if dist.get_world_size() == 1 else None,
            norms=self._norms,
            prepare=lambda group: stage3.use_gradient(group, self._groups[group]),
            clip=self._clip,
        )

    def finish_accumulation(self) -> None:
        """Zero the gradients of parameters without a gradient in any micro-batch of the step."""
        if not self._present:
            # otherwise training would continue with zero gradients
            raise unsupported("it does not call the methods that store gradients")
        for key, shard in self._shards.items():
            if key not in self._present:
                shard.zero_()

    def start_step(self) -> None:
        """Let the next gradient of each parameter overwrite the one of the last step."""
        self._present.clear()

    def items(self) -> Iterator[tuple[Parameter, Tensor]]:
        """Iterate over the parameters with this rank's gradient ``[shard_numel]``, a view."""
        for group in self._stage3.groups:
            for parameter in group:
                yield parameter, self._shards[id(parameter)]

    @torch.no_grad()
    def _store_whole(self, parameter: Parameter) -> None:
        """Store a complete gradient, which needs no reduction on a single rank."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._add(parameter, self._shards[id(parameter)].view_as(gradient), gradient)

    @torch.no_grad()
    def _store_partitions(self, parameters: Iterable[Parameter], partitions: Iterable[Tensor]) -> None:
        """Store this rank's partitions of the averaged gradients."""
        for parameter, partition in zip(parameters, partitions, strict=True):
            whole, parameter.grad = parameter.grad, None
            if whole is not None and whole.is_cuda:
                # the reduce stream, which is current here, may still read memory that another stream would reuse
                whole.record_stream(torch.cuda.current_stream())
            shard = self._shards[id(parameter)]
            # zero the padding, which may be non-finite after a skipped step
            shard[len(partition) :].zero_()
            self._add(parameter, shard[: len(partition)], partition)

    def _add(self, parameter: Parameter, shard: Tensor, gradient: Tensor) -> None:
        if id(parameter) in self._present:
            shard.add_(gradient)
        else:
            shard.copy_(gradient)
            self._present.add(id(parameter))

    def _norms(self) -> list[Tensor]:
        """Return the L2 norm of the gradient over all ranks; -1, DeepSpeed's convention, if it is non-finite."""
        square = squared_norm(self._groups)
        dist.all_reduce(square)
        return [torch.where(square.isfinite(), square.sqrt(), -1.0).float()]

    def _clip(self, group: int, norm: Tensor) -> None:
        # as torch.nn.utils.clip_grad_norm_
        limit = self._stage3.clip_limit
        self._adamw.divisor = ((norm + 1e-6) / limit).clamp_min(1.0) if limit else None


class ModuleClipping:
    """Clips the gradient of each module (the backbone, each head) to a norm of at most ``limit``, on shards.

    Each rank passes its shards of the gradients, already averaged over ranks and micro-batches. One all-reduce sums
    the squared norms of all modules. DeepSpeed's own clipping must be off.
    """

    def __init__(self, parameters: Mapping[str, Parameter], limit: float) -> None:
        """``parameters``: by name; the part before the first dot names the module."""
        self._modules = sorted({name.partition(".")[0] for name in parameters})
        self._module_of = {id(p): self._modules.index(name.partition(".")[0]) for name, p in parameters.items()}
        self._limit = limit
        self._norms: Tensor | None = None

    @torch.no_grad()
    def apply(self, gradients: Iterable[tuple[Parameter, Tensor]]) -> Tensor:
        """Clip in place, given each parameter with this rank's gradient shard.

        Returns the sum of the modules' norms before clipping, a scalar on their device.
        """
        shards: list[list[Tensor]] = [[] for _ in self._modules]
        for parameter, gradient in gradients:
            shards[self._module_of[id(parameter)]].append(gradient)
        squares = torch.stack([squared_norm(of_module) for of_module in shards])
        dist.all_reduce(squares)
        self._norms = squares.sqrt().float()
        # as torch.nn.utils.clip_grad_norm_
        factors = (self._limit / (self._norms + 1e-6)).clamp_max(1.0)
        for of_module, factor in zip(shards, factors, strict=True):
            for gradient in of_module:
                gradient.mul_(factor)
        return self._norms.sum()

    def scalars(self) -> dict[str, float]:
        """Return the norms before the last clipping, by TensorBoard tag."""
        assert self._norms is not None, "no step yet"
        tag = "optim/gradient_norm"
        norms = dict(zip(self._modules, self._norms.tolist(), strict=True))
        total = float(self._norms.square().sum().sqrt())
        return {tag: total, **{f"{tag}/{name}": norm for name, norm in norms.items()}}


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the squared L2 norm of all fp32 ``gradients [numel]`` together, fp64, summed in a fixed order."""
    norms = []
    for gradient in gradients:
        whole = len(gradient) // ROW * ROW
        norms += [torch.linalg.vector_norm(gradient[:whole].view(-1, ROW), dim=1)]
        norms += [torch.linalg.vector_norm(gradient[whole:])[None]]
    return torch.cat(norms).double().square().sum()
