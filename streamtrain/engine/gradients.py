"""What becomes of gradients between the backward and the update.

DeepSpeed (0.19) holds a rank's gradients in one flat fp32 tensor, but takes ten operations on all of them: it copies
them into a bucket and from there into another, divides by the number of ranks, reduces, widens, copies; for the update
it widens once more, takes the norm, flattens into fresh memory, scales. Here they are put where they stay, and read
once for the norm and once for the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from streamtrain.engine.clipping import squared_norm
from streamtrain.engine.optim import AdamW


class FlatGradients:
    """This rank's part of the gradient of each parameter, summed over the micro-batches of a step, fp32.

    Takes the place of methods of DeepSpeed's optimiser: of those that put away what has been reduced (with one rank:
    what there is to reduce), that find the norm, and that prepare an update and clip it.
    """

    def __init__(self, zero: Any, adamw: AdamW) -> None:
        """Take over from DeepSpeed's optimiser.

        Args:
            zero: that optimiser.
            adamw: which divides by what clipping asks for, while it passes over the gradient anyway.
        """
        self._zero, self._adamw = zero, adamw
        flat = zero.grad_partitions_flat_buffer
        assert flat.dtype == torch.float32
        sizes = {p.ds_id: p.partition_numel() for group in zero.fp16_groups for p in group}
        self._parts = dict(zip(sizes, flat.split(list(sizes.values())), strict=True))
        self._groups = flat.split([sum(sizes[p.ds_id] for p in group) for group in zero.fp16_groups])
        # DeepSpeed's numbers of the parameters that have a gradient in this step
        self._present: set[int] = set()
        self._replace("partition_grads", self._put_away)
        self._replace("_get_norm_groups", self._norms)
        self._replace("_prepare_fp32_grad_for_sub_group", self._prepare)
        self._replace("unscale_and_clip_grads", self._clip_group)
        if dist.get_world_size() == 1:
            self._replace("reduce_independent_p_g_buckets_and_remove_grads", self._take)

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        # a method of another name would be left as it is, and these here not called
        assert callable(getattr(self._zero, name))
        setattr(self._zero, name, method)

    def complete(self) -> None:
        """All micro-batches of a step have been seen: what took no part in any has a gradient of 0."""
        # else a DeepSpeed that no longer calls what is replaced here would train on nothing
        assert self._present, f"no gradient has come by: DeepSpeed {deepspeed.__version__} is not known to streamtrain"
        for number, part in self._parts.items():
            if number not in self._present:
                part.zero_()

    def forget(self) -> None:
        """The next gradient is the first one of another step."""
        self._present.clear()

    def parts(self) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
        """Each parameter with its gradient ``[numel of the fragment]``, a view."""
        for group in self._zero.fp16_groups:
            for parameter in group:
                yield parameter, self._parts[parameter.ds_id]

    @torch.no_grad()
    def _take(self, parameter: torch.nn.Parameter) -> None:
        """With one rank: a whole gradient, which need not be averaged with others."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._add(parameter, self._parts[parameter.ds_id].view_as(gradient), gradient)

    @torch.no_grad()
    def _put_away(self, parameters: Iterable[torch.nn.Parameter], partitions: Iterable[Tensor]) -> None:
        """With several ranks: this one's part of their average."""
        for parameter, partition in zip(parameters, partitions, strict=True):
            whole, parameter.grad = parameter.grad, None
            if whole is not None and whole.is_cuda:
                # the stream that reduces, this one, may still be reading what another one is about to reuse
                whole.record_stream(torch.cuda.current_stream())
            part = self._parts[parameter.ds_id]
            # padding, in which a step that was left out may have put what is not finite
            part[len(partition) :].zero_()
            self._add(parameter, part[: len(partition)], partition)

    def _add(self, parameter: torch.nn.Parameter, part: Tensor, gradient: Tensor) -> None:
        if parameter.ds_id in self._present:
            part.add_(gradient)
        else:
            part.copy_(gradient)
            self._present.add(parameter.ds_id)

    def _norms(self) -> list[Tensor]:
        """The L2 norm of the gradient over all ranks; -1 (as DeepSpeed has it) where it is not finite."""
        square = squared_norm(self._groups)
        dist.all_reduce(square)
        return [torch.where(square.isfinite(), square.sqrt(), -1.0).float()]

    def _prepare(self, group: int) -> None:
        self._zero.fp32_partitioned_groups_flat[group].grad = self._groups[group]
        self._zero.averaged_gradients[group] = None

    def _clip_group(self, group: int, norm: Tensor) -> None:
        # as torch.nn.utils.clip_grad_norm_
        limit = self._zero.clip_grad
        self._adamw.divisor = ((norm + 1e-6) / limit).clamp_min(1.0) if limit else None
