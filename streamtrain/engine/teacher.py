"""Sharded networks without gradients: the EMA teacher, and frozen networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from streamtrain.engine import deepspeed_compat
from streamtrain.engine.deepspeed_compat import shard_of
from streamtrain.engine.fragments import Fragment, Shard
from streamtrain.engine.moments import HOST_CHUNK
from streamtrain.engine.zero import ShardedWeight, Student
from streamtrain.ops.host_memory import staged_chunks


class ShardedNetwork:
    """A network for inference, gathered block by block."""

    def __init__(self, module: torch.nn.Module, leaf: type[torch.nn.Module], settings: dict[str, Any]) -> None:
        """``module``: from ``build_sharded`` with the same ``settings``."""
        deepspeed.utils.set_z3_leaf_modules(module, [leaf])
        module.requires_grad_(False)
        self._engine, *_ = deepspeed.initialize(model=module, config=settings)
        self._engine.eval()
        # the attribute ``optimizer`` of an engine without one is DeepSpeed's parameter offload
        deepspeed_compat.let_host_run_ahead(self._engine.optimizer)
        self.parameters = dict(module.named_parameters())
        for name, parameter in self.parameters.items():
            # a replicated parameter would not follow writes to its shard
            assert not deepspeed_compat.is_persistent(parameter), name

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """Run the network's forward, which gathers each block once."""
        return self._engine(*inputs)

    def teacher_features(self, *inputs: Any) -> Any:
        """Return ``SSLModel.teacher_features`` of one micro-batch."""
        return self("teacher_features", *inputs)

    def features(self, images: torch.Tensor) -> Any:
        return self("features", images)

    def weight(self, name: str) -> ShardedWeight | None:
        """Return a handle for gathering one parameter; None if the network does not have it."""
        return ShardedWeight(self.parameters[name]) if name in self.parameters else None

    def gather_seconds(self) -> tuple[float, int]:
        """Time the all-gather of one block; returns the seconds and the bytes that this rank receives."""
        block = [value for name, value in self.parameters.items() if ".blocks.0." in name]
        shards = [shard_of(parameter) for parameter in block]
        self.release()
        _synchronise(shards[0].device)
        began = time.perf_counter()
        with deepspeed.zero.GatheredParameters(block):
            _synchronise(block[0].device)
            seconds = time.perf_counter() - began
        return seconds, sum(shard.nbytes for shard in shards) * (dist.get_world_size() - 1)

    def release(self) -> None:
        """Release gathered parameters; call it before writing a shard, or the old values would still be used."""
        deepspeed_compat.release_parameters(self._engine)


def _share(parameters: Mapping[str, torch.nn.Parameter], others: Mapping[str, torch.nn.Parameter]) -> None:
    """Let ``parameters`` use the storage of the shards of ``others``, which are partitioned identically."""
    for name, other in others.items():
        assert shard_of(parameters[name]).shape == shard_of(other).shape, name
        shard_of(parameters[name]).data = shard_of(other).data


def _synchronise(device: torch.device) -> None:
    """Wait for all ranks and their devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


class FrozenNetwork(ShardedNetwork):
    """A frozen teacher, Gram teacher or anchor, stored in the run's dtype only.

    Attributes:
        own: the parameters by name that are not shared with another network; only these are written and saved.
    """

    def __init__(
        self, module: torch.nn.Module, leaf: type[torch.nn.Module], rank: int, settings: dict[str, Any],
        shared: Mapping[str, torch.nn.Parameter] | None = None,
    ) -> None:  # fmt: skip
        """``shared``: frozen parameters of another network by name, from whose shards this network gathers its own."""
        super().__init__(module, leaf, settings)
        self.fragments = {name: Fragment.of(parameter, rank) for name, parameter in self.parameters.items()}
        _share(self.parameters, shared or {})
        self.own = {name: parameter for name, parameter in self.parameters.items() if name not in (shared or {})}

    @torch.no_grad()
    def write(self, read: Callable[[str, Fragment], torch.Tensor]) -> None:
        """Set every value of ``own`` from ``read(name, fragment) -> [numel]``."""
        self.release()
        for name, parameter in self.own.items():
            shard_of(parameter).copy_(read(name, self.fragments[name]))

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """Iterate over the names of ``own`` with this rank's shards."""
        for name, parameter in self.own.items():
            # bind the tensor now: DeepSpeed may replace it by another one with the same values
            yield name, Shard(self.fragments[name].numel, shard_of(parameter).detach)


class Teacher(ShardedNetwork):
    """The EMA of the student's fp32 masters, updated shard by shard without communication.

    The network is partitioned like the student. The EMA is fp32, one flat tensor for each of the student's. The network
    computes from shards in its own dtype; if that is fp32, they share the EMA's memory. Parameters that are frozen in
    the student have no EMA: both networks gather them from the same shards.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        leaf: type[torch.nn.Module],
        student: Student,
        settings: dict[str, Any],
        on_host: bool = False,
    ) -> None:
        """``on_host``: store the EMA in (pinned) host memory and update it on the device in chunks."""
        super().__init__(module, leaf, settings)
        self._student = student
        masters = student.master_groups
        on_host = on_host and masters[0].is_cuda
        dtype = shard_of(next(iter(self.parameters.values()))).dtype
        self._values = [torch.empty_like(master, dtype=dtype) for master in masters]
        _share(self.parameters, student.frozen)
        for name in student.parameters:
            parameter = self.parameters[name]
            group, offset, numel = student.position(name)
            assert shard_of(parameter).numel() == numel, name
            # DeepSpeed gathers from the shard: make it a view of the flat tensor that update() writes
            shard_of(parameter).data = self._values[group].narrow(0, offset, numel)
        # allocated after the engine's own shards have been freed
        if dtype == masters[0].dtype and not on_host:
            self._ema = self._values
        else:
            device = torch.device("cpu") if on_host else masters[0].device
            self._ema = [torch.empty(m.shape, dtype=m.dtype, device=device, pin_memory=on_host) for m in masters]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Set ``ema = momentum * ema + (1 - momentum) * master`` on this rank's shards."""
        self.release()
        for ema_group, value_group, master_group in zip(
            self._ema, self._values, self._student.master_groups, strict=True
        ):
            for part, (ema,) in staged_chunks([ema_group], master_group.device, HOST_CHUNK):
                ema.lerp_(master_group[part].detach(), 1.0 - momentum)
                if value_group is not ema_group:
                    value_group[part].copy_(ema)

    def ema_shard(self, name: str) -> torch.Tensor:
        """Return a ``[numel]`` view of this rank's EMA fragment of parameter ``name``, fp32, or of its frozen shard."""
        self._wait_for_copies()
        return shard_of(self.parameters[name]) if name in self._student.frozen else self._view(name)

    def shards(self) -> dict[str, Shard]:
        """Return this rank's shards for a checkpoint: ``ema/name``, and ``frozen/name`` of frozen parameters."""
        self._wait_for_copies()
        fragments, student = self._student.fragments, self._student
        shards = {f"ema/{name}": Shard(fragments[name].numel, partial(self._view, name)) for name in student.parameters}
        frozen = {name: shard_of(parameter).detach() for name, parameter in student.frozen.items()}
        # a method bound to this tensor: DeepSpeed may replace the parameter's by another one with the same values
        return shards | {f"frozen/{name}": Shard(len(shard), shard.detach) for name, shard in frozen.items()}

    @torch.no_grad()
    def write(self, read: Callable[[str, Fragment], torch.Tensor]) -> None:
        """Set the EMA from ``read(ema/name, fragment) -> [numel]``."""
        for name in self._student.parameters:
            self._view(name).copy_(read(f"ema/{name}", self._student.fragments[name]))
        self.update(1.0)

    def _view(self, name: str) -> torch.Tensor:
        group, offset, numel = self._student.position(name)
        return self._ema[group].narrow(0, offset, numel)

    def _wait_for_copies(self) -> None:
        if self._ema[0].is_pinned():
            torch.cuda.synchronize()
