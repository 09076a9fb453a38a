"""Gradients between the backward pass and the update: reduction, accumulation, norms and clipping, on shards.

DeepSpeed 0.19 keeps a rank's gradients in one flat fp32 tensor but reads or writes all of them about ten times a step:
two bucket copies, division by the number of ranks, reduction, conversion to fp32 and a copy; for the update another
conversion, the norm, flattening into new memory and scaling. Here each gradient is laid out once for the reduction and
written to its final position, then read once for the norm and once for the update.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from streamtrain.engine.deepspeed_compat import Stage3Optimizer, cloned_world_group, shard_numel, unsupported
from streamtrain.engine.optim import AdamW

# squares are summed in fp32 within rows of this many values, and the row sums in fp64
ROW = 2**14


@dataclass(frozen=True)
class _Reduction:
    """A reduction in progress; once it is finished, ``shards`` holds this rank's shards of the average gradients."""

    parameters: Sequence[Parameter]
    # input of the reduce-scatter, kept until ``wait`` so that the allocator can reuse it in stream order
    bucket: Tensor
    # reduced shards, in the order of ``parameters``
    shards: Tensor
    work: dist.Work


class FlatGradients:
    """This rank's gradient shards, fp32, averaged over the ranks and summed over the micro-batches of a step.

    Replaces the methods of DeepSpeed's optimiser that reduce and store gradients, compute their norm, and prepare and
    clip an update. Gradients are reduced in buckets, one at a time, during the backward pass. The compute stream waits
    for one bucket before it starts the next, so memory is freed and reused in stream order and the host never waits.
    """

    def __init__(self, stage3: Stage3Optimizer, adamw: AdamW, bucket_bytes: int) -> None:
        """``adamw`` applies the clipping factor while it reads the gradient; ``bucket_bytes`` are reduced together."""
        self._stage3, self._adamw, self._bucket_bytes = stage3, adamw, bucket_bytes
        self._ranks = dist.get_world_size()
        flat = stage3.flat_gradients
        assert flat.dtype == torch.float32
        sizes = {id(p): shard_numel(p) for group in stage3.groups for p in group}
        self._shards = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        self._groups = flat.split([sum(sizes[id(p)] for p in group) for group in stage3.groups])
        # ids of the parameters that have a gradient in this step
        self._present: set[int] = set()
        # complete gradients for the next reduction
        self._pending: deque[tuple[Parameter, Tensor]] = deque()
        self._reduction: _Reduction | None = None
        # of the last step, before clipping
        self.norm = flat.new_zeros(())
        stage3.replace_gradient_path(
            store=self._store,
            norms=self._norms,
            prepare=lambda group: stage3.use_gradient(group, self._groups[group]),
            clip=self._clip,
        )

    def finish_accumulation(self) -> None:
        """Finish the reductions, and zero the gradients of parameters without one in any micro-batch of the step."""
        self._finish_reduction()
        if not self._present:
            # otherwise training would continue with zero gradients
            raise unsupported("it does not call the method that reduces gradients")
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
    def _store(self, parameter: Parameter) -> None:
        """Take a parameter's complete gradient of this micro-batch."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self._ranks == 1:
            self._add(parameter, gradient)
            return
        pending = sum(each.nbytes for _, each in self._pending)
        if pending and pending + gradient.nbytes > self._bucket_bytes:
            self.start_reduction()
        self._pending.append((parameter, gradient))

    @torch.no_grad()
    def start_reduction(self) -> None:
        """Start averaging the pending gradients over the ranks; call it after each micro-batch's backward pass."""
        self._finish_reduction()
        if not self._pending:
            return
        parameters = [parameter for parameter, _ in self._pending]
        # row r: the shards of rank r; each gradient is freed once it is copied, if it needs padding
        rows = []
        while self._pending:
            rows.append(_by_rank(self._pending.popleft()[1], self._ranks))
        bucket = (torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]).div_(self._ranks)
        shards = bucket.new_empty(bucket.shape[1])
        # DeepSpeed's gathers use the same group, so NCCL keeps the order in which the host starts them
        work = dist.reduce_scatter_tensor(shards, bucket.flatten(), group=cloned_world_group(), async_op=True)
        assert work is not None
        self._reduction = _Reduction(parameters, bucket, shards, work)

    def _finish_reduction(self) -> None:
        reduction, self._reduction = self._reduction, None
        if reduction is None:
            return
        reduction.work.wait()
        sizes = [shard_numel(parameter) for parameter in reduction.parameters]
        for parameter, shard in zip(reduction.parameters, reduction.shards.split(sizes), strict=True):
            self._add(parameter, shard)

    def _add(self, parameter: Parameter, gradient: Tensor) -> None:
        shard = self._shards[id(parameter)].view(gradient.shape)
        if id(parameter) in self._present:
            shard.add_(gradient)
        else:
            shard.copy_(gradient)
            self._present.add(id(parameter))

    def _norms(self) -> list[Tensor]:
        """Return the L2 norm of the gradient over all ranks; -1, DeepSpeed's convention, if it is non-finite."""
        square = squared_norm(self._groups)
        dist.all_reduce(square)
        self.norm = square.sqrt().float()
        return [torch.where(square.isfinite(), self.norm, -1.0)]

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
        # of the last step, before clipping
        self.norms: dict[str, Tensor] = {}

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
        norms = squares.sqrt().float()
        self.norms = dict(zip(self._modules, norms, strict=True))
        # as torch.nn.utils.clip_grad_norm_
        factors = (self._limit / (norms + 1e-6)).clamp_max(1.0)
        for of_module, factor in zip(shards, factors, strict=True):
            for gradient in of_module:
                gradient.mul_(factor)
        return norms.sum()


def _by_rank(gradient: Tensor, ranks: int) -> Tensor:
    """Return ``[ranks, shard_numel]``, each rank's part of a gradient; the last ones are padded with zeros."""
    flat = gradient.flatten()
    missing = -len(flat) % ranks
    return (F.pad(flat, (0, missing)) if missing else flat).view(ranks, -1)


def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the squared L2 norm of all fp32 ``gradients [numel]`` together, fp64, summed in a fixed order."""
    norms = []
    for gradient in gradients:
        whole = len(gradient) // ROW * ROW
        norms += [torch.linalg.vector_norm(gradient[:whole].view(-1, ROW), dim=1)]
        norms += [torch.linalg.vector_norm(gradient[whole:])[None]]
    return torch.cat(norms).double().square().sum()
