"""Networks in shards without gradients: what teachers are, and one whose values stay as they are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from streamtrain.engine.zero import Fragment, Shard, ShardedWeight


class ShardedNetwork:
    """Evaluated block by block; ``module`` as from ``build_sharded``, with the same ``settings``."""

    def __init__(self, module: torch.nn.Module, leaf: type[torch.nn.Module], settings: dict[str, Any]) -> None:
        deepspeed.utils.set_z3_leaf_modules(module, [leaf])
        module.requires_grad_(False)
        self._engine, *_ = deepspeed.initialize(model=module, config=settings)
        self._engine.eval()
        self.parameters = dict(module.named_parameters())
        for name, parameter in self.parameters.items():
            # one that every rank keeps whole would not follow what is written to its shard
            assert not parameter.ds_persist, name

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """The network's forward, each block gathered once."""
        return self._engine(*inputs)

    def teacher_features(self, *inputs: Any) -> Any:
        """Return ``SSLModel.teacher_features`` of one micro-batch."""
        return self("teacher_features", *inputs)

    def features(self, images: torch.Tensor) -> Any:
        """Return ``SSLModel.features`` of images."""
        return self("features", images)

    def weight(self, name: str) -> ShardedWeight | None:
        """Handle of one parameter for those who must read it whole; None if the network has no such one."""
        return ShardedWeight(self.parameters[name]) if name in self.parameters else None

    def gather_seconds(self) -> tuple[float, int]:
        """How long it takes to make one block whole from all ranks' parts, and the bytes that this rank received."""
        block = [value for name, value in self.parameters.items() if ".blocks.0." in name]
        self.release()
        _synchronise(block[0].ds_tensor.device)
        began = time.perf_counter()
        with deepspeed.zero.GatheredParameters(block):
            _synchronise(block[0].device)
            seconds = time.perf_counter() - began
        own = sum(parameter.ds_tensor.numel() * parameter.ds_tensor.element_size() for parameter in block)
        return seconds, own * (dist.get_world_size() - 1)

    def release(self) -> None:
        """To be called before a shard is written: a parameter that is still whole would be read in its place."""
        self._engine.optimizer.partition_all_parameters()


def _synchronise(device: torch.device) -> None:
    """All ranks and their devices have done what they were told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


class FrozenNetwork(ShardedNetwork):
    """A teacher for distillation, or the Gram teacher; its values are kept in the run's number format only."""

    def __init__(
        self, module: torch.nn.Module, leaf: type[torch.nn.Module], rank: int, settings: dict[str, Any]
    ) -> None:
        super().__init__(module, leaf, settings)
        self.fragments = {name: Fragment.of(parameter, rank) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def write(self, read: Callable[[str, Fragment], torch.Tensor]) -> None:
        """Set every value from ``read(name, fragment) -> [numel]``."""
        self.release()
        for name, parameter in self.parameters.items():
            parameter.ds_tensor.copy_(read(name, self.fragments[name]))

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """This rank's part of each parameter, by name."""
        for name, parameter in self.parameters.items():
            # bound now: the tensor that ds_tensor is may be another one later, its values the same
            yield name, Shard(self.fragments[name].numel, parameter.ds_tensor.detach)
