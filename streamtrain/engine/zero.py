"""The student under ZeRO-3: built sharded, fed micro-batches, stepped once an optimiser step.

Every rank owns, of each parameter, one contiguous fragment of its flattened values (the last rank's is
padded). ``Fragment`` says which; checkpoints, initial values and the teacher all speak in fragments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from streamtrain.config.tree import Config
from streamtrain.engine.clipping import ModuleClipping
from streamtrain.engine.gradients import FlatGradients
from streamtrain.engine.moments import KEYS
from streamtrain.engine.optim import AdamW, moments_maker, parameter_groups, set_rates
from streamtrain.engine.runtime import Runtime
from streamtrain.engine.samples import sampled
from streamtrain.planning.shapes import SUB_GROUP_NUMEL


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one flattened parameter: ``[start, stop)`` of its values, ``numel`` with padding."""

    shape: tuple[int, ...]
    start: int
    stop: int
    numel: int

    @classmethod
    def of(cls, parameter: torch.nn.Parameter, rank: int) -> Fragment:
        """The fragment of a ZeRO-3 parameter that ``rank`` owns."""
        numel = parameter.partition_numel()
        start = min(rank * numel, parameter.ds_numel)
        return cls(tuple(parameter.ds_shape), start, min(start + numel, parameter.ds_numel), numel)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """``[numel]``: the fragment of a whole parameter's ``values``, padded with zeros; a view where it is whole."""
        part = values.reshape(-1)[self.start : self.stop]
        padding = self.numel - part.numel()
        return torch.nn.functional.pad(part, (0, padding)) if padding else part


@dataclass(frozen=True)
class Shard:
    """``numel`` fp32 values of this rank, made when they are read."""

    numel: int
    read: Callable[[], torch.Tensor]


class ShardedWeight:
    """A parameter that another module may read whole, for the time of a ``with`` block.

    It is passed where a tensor would be: ZeRO-3's hooks replace tensor arguments by detached copies,
    which no longer know how to be gathered.
    """

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self._parameter = parameter

    @contextmanager
    def gathered(self) -> Iterator[torch.Tensor]:
        """Yield the whole tensor, without gradient and to be read only; it is released at the end of the block."""
        if dist.get_world_size() == 1:
            # the shard is the whole already, which DeepSpeed would copy
            yield self._parameter.ds_tensor.detach().view(self._parameter.ds_shape)
            return
        with deepspeed.zero.GatheredParameters([self._parameter]):
            yield self._parameter.detach()


def engine_config(config: Config, runtime: Runtime, accumulation: int, block_numel: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; equal for student and teacher, so that they are partitioned alike.

    ``block_numel`` (parameters of one backbone block) bounds what is gathered: DeepSpeed's defaults would
    keep the whole model alive.
    """
    on_gpu, several = runtime.device.type == "cuda", runtime.world_size > 1
    zero = {
        "stage": 3,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        # one rank has nothing to reduce
        "reduce_bucket_size": config.engine.reduce_bucket_bytes // runtime.dtype.itemsize if several else 1,
        "sub_group_size": SUB_GROUP_NUMEL,
        "stage3_max_live_parameters": config.engine.live_blocks * block_numel,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": block_numel if on_gpu else 0,
        # a small parameter kept whole on every rank would go stale in the teacher, and a block is gathered
        # as one piece anyway
        "stage3_param_persistence_threshold": 0,
    }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip if config.optim.clip_per == "global" else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    if runtime.dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def build_sharded(build: Callable[[], torch.nn.Module], settings: dict[str, Any]) -> torch.nn.Module:
    """Construct a module so that no rank ever holds it whole; its values are undefined until written."""
    with deepspeed.zero.Init(config_dict_or_path=settings):
        return build()


class Student:
    """The student module, its optimiser and its fp32 masters, in shards."""

    def __init__(
        self, module: torch.nn.Module, leaf: type[torch.nn.Module], config: Config, runtime: Runtime,
        settings: dict[str, Any],
    ) -> None:
        deepspeed.utils.set_z3_leaf_modules(module, [leaf])
        groups = parameter_groups(module.named_parameters(), config.model.depth, config.optim)
        folder = Path(config.engine.moments_dir or f"{config.run.dir}/moments") / f"rank-{runtime.rank:05d}"
        self._adamw = AdamW(groups, config.optim, moments_maker(config.engine, folder, runtime.device))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=module, optimizer=self._adamw, config=settings)
        if runtime.dtype == torch.float32:
            # the masters are the values; DeepSpeed means to share them, but compares a device with a string
            values = self._optimizer.fp16_partitioned_groups_flat
            for master, value in zip(self.master_groups, values, strict=True):
                master.data = value
        self._gradients = FlatGradients(self._optimizer, self._adamw)
        self.module = module
        self.parameters = dict(module.named_parameters())
        self.fragments = {name: Fragment.of(p, runtime.rank) for name, p in self.parameters.items()}
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        # whether the coming step keeps some values of this rank's part of its gradient, and those
        self.sample_gradients = False
        self.gradient_samples: dict[str, torch.Tensor] = {}
        # scalars of the step under way that are finite in a sound one
        self._doubtful: list[torch.Tensor] = []
        self._clipping = (
            ModuleClipping(self.parameters, config.optim.clip) if config.optim.clip_per == "module" else None
        )

    def accumulate(self, *inputs: Any) -> dict[str, torch.Tensor]:
        """Run ``student_losses`` of the module on one micro-batch and its backward; return the losses, detached."""
        losses = self._engine("student_losses", *inputs)
        self._engine.backward(losses["total"])
        if self._engine.is_gradient_accumulation_boundary():
            self._gradients.complete()
        self._doubtful.append(losses["total"].detach())
        return {name: loss.detach() for name, loss in losses.items()}

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        """Call after each ``accumulate``; the last one of an optimiser step applies the update.

        ``before_update`` is called before anything that a checkpoint keeps is changed.

        Where a loss or the gradient of any rank is not finite, nothing is changed on any rank; ``applied`` says so.
        """
        last = self._engine.is_gradient_accumulation_boundary()
        if last:
            parts = list(self._gradients.parts())
            if self.sample_gradients:
                self.gradient_samples = sampled((self._names[id(parameter)], part) for parameter, part in parts)
            if self._clipping is not None:
                self._doubtful.append(self._clipping.apply(parts))
            # The engine leaves out an update whose gradient has no finite norm, which all ranks reduce together and
            # read at once. What else must be finite travels with it: times 0 it is 0, or NaN.
            parts[0][1][:1].add_(torch.stack(self._doubtful).sum() * 0)
            self._doubtful.clear()
            before_update()
        self._engine.step()
        if last:
            self._gradients.forget()

    @property
    def applied(self) -> bool:
        """Whether the last optimiser step changed anything; the same on all ranks."""
        return bool(self._engine.was_step_applied())

    def set_rates(
        self, lr: float, weight_decay: float, last_layer_frozen: bool, backbone_frozen: bool = False
    ) -> None:
        """Rates of the coming optimiser step."""
        set_rates(self._optimizer.optimizer.param_groups, lr, weight_decay, last_layer_frozen, backbone_frozen)

    def gradient_norms(self) -> dict[str, float]:
        """L2 norm of the last step's gradient before clipping, and of its modules' where each is clipped, by tag."""
        if self._clipping is not None:
            return self._clipping.scalars()
        return {"optim/gradient_norm": float(self._engine.get_global_grad_norm() or 0.0)}

    def master(self, name: str) -> torch.Tensor:
        """``[numel]`` fp32 view of this rank's fragment of the master of parameter ``name``."""
        group, offset, numel = self.position(name)
        return self.master_groups[group].detach().narrow(0, offset, numel)

    def weight_samples(self) -> dict[str, torch.Tensor]:
        """Some values of this rank's part of the masters, by part of the network."""
        return sampled((name, self.master(name)) for name in self.parameters)

    def finite(self) -> bool:
        """Whether all of this rank's masters are finite numbers."""
        return all(bool(torch.stack(torch.aminmax(flat.detach())).isfinite().all()) for flat in self.master_groups)

    @property
    def master_groups(self) -> list[torch.Tensor]:
        """The flat fp32 tensors that the masters are views of."""
        return self._optimizer.fp32_partitioned_groups_flat

    def position(self, name: str) -> tuple[int, int, int]:
        return self._optimizer.grad_position[self._optimizer.get_param_id(self.parameters[name])]

    def shards(self) -> dict[str, Shard]:
        """Everything that a checkpoint keeps of this rank, by ``kind/name``."""
        shards = {}
        for name in self.parameters:
            group, offset, numel = self.position(name)
            shards[f"master/{name}"] = Shard(numel, partial(self.master, name))
            moments = self._adamw.moments(self.master_groups[group])
            if moments is None:
                continue
            for key in KEYS:
                shards[f"{key}/{name}"] = Shard(numel, partial(moments.read, key, offset, offset + numel))
        return shards

    def write(self, read: Callable[[str, Fragment], torch.Tensor], optimizer_steps: int) -> None:
        """Set masters, moments and low-precision values from ``read(kind/name, fragment) -> [numel]``.

        ``optimizer_steps`` is the number of updates the moments have seen; with 0 there are none to read.
        """
        if optimizer_steps:
            for flat in self.master_groups:
                self._adamw.begin(flat, optimizer_steps)
        for name, parameter in self.parameters.items():
            fragment = self.fragments[name]
            self.master(name).copy_(read(f"master/{name}", fragment))
            assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE, name
            parameter.ds_tensor.data.copy_(self.master(name))
            group, offset, _ = self.position(name)
            moments = self._adamw.moments(self.master_groups[group])
            if moments is None:
                continue
            for key in KEYS:
                moments.write(key, offset, read(f"{key}/{name}", fragment))
