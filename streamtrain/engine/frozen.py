"""Networks in shards without gradients: what teachers are, and one whose values stay as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch

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

    def weight(self, name: str) -> ShardedWeight | None:
        """Handle of one parameter for those who must read it whole; None if the network has no such one."""
        return ShardedWeight(self.parameters[name]) if name in self.parameters else None

    def release(self) -> None:
        """To be called before a shard is written: a parameter that is still whole would be read in its place."""
        self._engine.optimizer.partition_all_parameters()


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
