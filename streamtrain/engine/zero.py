"""The student under ZeRO-3: built sharded, fed micro-batches, updated once an optimiser step.

Each rank owns one contiguous ``Fragment`` of every flattened parameter (the last rank's is padded). Checkpoints,
initial values and the teacher are read and written in fragments. A frozen parameter (``requires_grad`` is False) has
neither master nor gradient nor moments nor EMA: its shard, in the network's dtype, is stored once for both networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from streamtrain.config.tree import Config
from streamtrain.engine import deepspeed_compat
from streamtrain.engine.fragments import Fragment, Shard
from streamtrain.engine.gradients import FlatGradients, ModuleClipping
from streamtrain.engine.moments import KEYS, moments_maker
from streamtrain.engine.optim import AdamW, parameter_groups, set_rates
from streamtrain.engine.runtime import Runtime
from streamtrain.planning.shapes import SUB_GROUP_NUMEL, block_shapes

# values of one parameter that go into a histogram, at most
SAMPLES_PER_PARAMETER = 4096


class ShardedWeight:
    """Handle of a parameter that another module may gather for the duration of a ``with`` block.

    Pass it instead of the tensor: ZeRO-3's hooks replace tensor arguments by detached copies, which cannot be gathered.
    """

    def __init__(self, parameter: Parameter) -> None:
        self._parameter = parameter

    @contextmanager
    def gathered(self) -> Iterator[Tensor]:
        """Yield the full tensor, read-only and without gradient; the end of the block releases it."""
        shard = deepspeed_compat.shard_of(self._parameter).detach()
        ranks = dist.get_world_size()
        # of one rank, the shard is the full tensor
        whole = shard if ranks == 1 else shard.new_empty(ranks * shard.numel())
        if ranks > 1:
            # deepspeed.zero.GatheredParameters would let the host wait for the whole GPU
            dist.all_gather_into_tensor(whole, shard)
        # the last shard is padded
        yield whole[: deepspeed_compat.full_numel(self._parameter)].view(deepspeed_compat.full_shape(self._parameter))


def engine_config(config: Config, runtime: Runtime, accumulation: int, block_numel: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration; student and teacher share it, so that both are partitioned identically.

    ``block_numel`` (parameters of one backbone block) limits the gathered parameters: DeepSpeed's defaults would keep
    the entire model gathered.
    """
    live_blocks = config.engine.live_blocks
    # DeepSpeed's limit and its prefetch are each exceeded by up to one parameter
    margin = 2 * max(map(math.prod, block_shapes(config.model).values())) if live_blocks > 2 else 0
    zero = {
        "stage": 3,
        # Gathers start on the compute stream, so that memory is freed and reused in its order; NCCL's own stream runs
        # them beside later blocks. The setting would start them on another stream, whose memory only the host can free.
        "overlap_comm": False,
        "contiguous_gradients": True,
        # engine/gradients.py reduces in its own buckets
        "reduce_bucket_size": 1,
        "sub_group_size": SUB_GROUP_NUMEL,
        "stage3_max_live_parameters": live_blocks * block_numel - margin,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": block_numel if runtime.on_gpu else 0,
        # Replicated small parameters would go stale in the teacher; sharding them costs nothing, since a block is
        # gathered in one piece.
        "stage3_param_persistence_threshold": 0,
    }
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip if config.optim.clip_per == "global" else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        # it would wait for the GPU twice in each micro-batch
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }
    if runtime.dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def build_sharded(build: Callable[[], Module], settings: dict[str, Any]) -> Module:
    """Construct a module so that no rank ever holds all of it; its values are undefined until written.

    Raises:
        ConfigError: if this DeepSpeed is not supported.
    """
    with deepspeed.zero.Init(config_dict_or_path=settings):
        module = build()
    deepspeed_compat.check_parameter(next(module.parameters()))
    return module


class Student:
    """The student module, its optimiser and its fp32 masters, sharded.

    Attributes:
        parameters: the trained parameters by name.
        frozen: the others.
        fragments: this rank's fragments of all of them.
    """

    def __init__(
        self, module: Module, leaf: type[Module], config: Config, runtime: Runtime, settings: dict[str, Any]
    ) -> None:
        deepspeed.utils.set_z3_leaf_modules(module, [leaf])
        named = dict(module.named_parameters())
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self.frozen = {name: p for name, p in named.items() if not p.requires_grad}
        groups = parameter_groups(self.parameters.items(), config.model.depth, config.optim)
        folder = Path(config.engine.moments_dir or f"{config.run.dir}/moments") / f"rank-{runtime.rank:05d}"
        self._adamw = AdamW(groups, config.optim, moments_maker(config.engine, folder, runtime.device))
        self._engine, optimizer, _, _ = deepspeed.initialize(model=module, optimizer=self._adamw, config=settings)
        self._stage3 = deepspeed_compat.Stage3Optimizer(optimizer)
        if runtime.dtype == torch.float32:
            # Share memory between masters and values. DeepSpeed intends to, but compares a device with a string.
            for master, value in zip(self.master_groups, self._stage3.flat_values, strict=True):
                master.data = value
        self._gradients = FlatGradients(self._stage3, self._adamw, config.engine.reduce_bucket_bytes)
        self.module = module
        self.fragments = {name: Fragment.of(p, runtime.rank) for name, p in named.items()}
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        # set ``sample_gradients`` to keep samples of this rank's gradient shards in the next step
        self.sample_gradients = False
        self.gradient_samples: dict[str, Tensor] = {}
        # scalars of the current step that must be finite
        self._must_be_finite: list[Tensor] = []
        self._clipping = (
            ModuleClipping(self.parameters, config.optim.clip) if config.optim.clip_per == "module" else None
        )

    def accumulate(self, *inputs: Any) -> dict[str, Tensor]:
        """Run ``student_losses`` and its backward on one micro-batch; returns the detached losses."""
        losses = self._engine("student_losses", *inputs)
        self._engine.backward(losses["total"])
        self._gradients.start_reduction()
        if self._engine.is_gradient_accumulation_boundary():
            self._gradients.finish_accumulation()
        self._must_be_finite.append(losses["total"].detach())
        return {name: loss.detach() for name, loss in losses.items()}

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        """Call after each ``accumulate``; the last call of an optimiser step applies the update.

        If a loss or the gradient of any rank is non-finite, no rank applies the update, and ``applied`` is False.
        ``before_update`` is called before any value that checkpoints save is changed.
        """
        last = self._engine.is_gradient_accumulation_boundary()
        if last:
            gradients = list(self._gradients.items())
            if self.sample_gradients:
                self.gradient_samples = sample_values((self._names[id(p)], gradient) for p, gradient in gradients)
            if self._clipping is not None:
                self._must_be_finite.append(self._clipping.apply(gradients))
            # The engine skips the update if the gradient norm over all ranks is non-finite. Make it non-finite if one
            # of these scalars is, without another reduction or host sync: 0 times a non-finite value is NaN.
            gradients[0][1][:1].add_(torch.stack(self._must_be_finite).sum() * 0)
            self._must_be_finite.clear()
            before_update()
        self._engine.step()
        if last:
            self._gradients.start_step()

    @property
    def applied(self) -> bool:
        """Whether the last optimiser step applied its update; the same on all ranks."""
        return bool(self._engine.was_step_applied())

    def set_rates(self, lr: float, weight_decay: float, last_layer_frozen: bool, backbone_frozen: bool = False) -> None:
        """Set the learning rate and weight decay of the next optimiser step."""
        set_rates(self._stage3.param_groups, lr, weight_decay, last_layer_frozen, backbone_frozen)

    def gradient_norms(self) -> dict[str, Tensor]:
        """Return the last step's gradient norm before clipping, and each module's if clipped per module, by tag."""
        tag = "optim/gradient_norm"
        if self._clipping is None:
            return {tag: self._gradients.norm}
        norms = self._clipping.norms
        total = torch.stack(list(norms.values())).square().sum().sqrt()
        return {tag: total, **{f"{tag}/{module}": norm for module, norm in norms.items()}}

    def master(self, name: str) -> Tensor:
        """Return a ``[numel]`` fp32 view of this rank's master fragment of parameter ``name``."""
        group, offset, numel = self.position(name)
        return self.master_groups[group].detach().narrow(0, offset, numel)

    def weight_samples(self) -> dict[str, Tensor]:
        """Return samples of this rank's master fragments, by part of the network."""
        return sample_values((name, self.master(name)) for name in self.parameters)

    def is_finite(self) -> bool:
        """Return whether all of this rank's masters are finite."""
        return all(bool(torch.stack(torch.aminmax(flat.detach())).isfinite().all()) for flat in self.master_groups)

    @property
    def master_groups(self) -> list[Tensor]:
        """The flat fp32 tensors that contain the masters."""
        return self._stage3.flat_masters

    def position(self, name: str) -> tuple[int, int, int]:
        """Return the index of the flat tensor that holds this rank's fragment of ``name``, the offset and the size."""
        return self._stage3.position(self.parameters[name])

    def shards(self) -> dict[str, Shard]:
        """Return this rank's shards for a checkpoint by ``kind/name``: masters and moments of trained parameters."""
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

    def write(self, read: Callable[[str, Fragment], Tensor], optimizer_steps: int) -> None:
        """Set masters, moments and low-precision values from ``read(kind/name, fragment) -> [numel]``.

        A frozen parameter is read as a master. ``optimizer_steps`` is the number of updates in the moments; if 0, no
        moments are read.
        """
        if optimizer_steps:
            for flat in self.master_groups:
                self._adamw.create_moments(flat, optimizer_steps)
        for name, parameter in self.parameters.items():
            fragment = self.fragments[name]
            self.master(name).copy_(read(f"master/{name}", fragment))
            assert not deepspeed_compat.is_gathered(parameter), name
            deepspeed_compat.shard_of(parameter).data.copy_(self.master(name))
            group, offset, _ = self.position(name)
            moments = self._adamw.moments(self.master_groups[group])
            if moments is None:
                continue
            for key in KEYS:
                moments.write(key, offset, read(f"{key}/{name}", fragment))
        for name, parameter in self.frozen.items():
            assert not deepspeed_compat.is_gathered(parameter), name
            deepspeed_compat.shard_of(parameter).data.copy_(read(f"master/{name}", self.fragments[name]))


def part_of(name: str) -> str:
    """Return the part of the network: ``embedding``, ``block_03``, ``norm``, ``patch_head``, ``patch_prototypes``."""
    head, _, rest = name.partition(".")
    if head != "backbone":
        return head.replace("_head", "_prototypes") if rest.startswith("prototypes") else head
    pieces = rest.split(".")
    return f"block_{int(pieces[1]):02d}" if pieces[0] == "blocks" else pieces[0]


def sample_values(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return evenly spaced fp32 samples of ``(parameter name, values)`` pairs, by part of the network."""
    samples: dict[str, list[Tensor]] = {}
    for name, values in named:
        flat = values.detach().flatten()
        stride = -(-flat.numel() // SAMPLES_PER_PARAMETER)
        if stride:
            samples.setdefault(part_of(name), []).append(flat[::stride].float())
    return {part: torch.cat(pieces) for part, pieces in samples.items()}
