"""A network in shards that does not learn: a teacher for distillation, or the Gram teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch

from streamtrain.engine.zero import Fragment, Shard, ShardedWeight


class FrozenNetwork:
    """Evaluated block by block like the teacher; its values are kept in the run's number format only."""

    def __init__(
        self, module: torch.nn.Module, leaf: type[torch.nn.Module], rank: int, settings: dict[str, Any]
    ) -> None:
        """``module`` as from ``build_sharded``, with the same ``settings``."""
        deepspeed.utils.set_z3_leaf_modules(module, [leaf])
        module.requires_grad_(False)
        self._engine, *_ = deepspeed.initialize(model=module, config=settings)
        self._engine.eval()
        self.parameters = dict(module.named_parameters())
        self.fragments = {name: Fragment.of(parameter, rank) for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """The network's forward, each block gathered once."""
        return self._engine(*inputs)

    def weight(self, name: str) -> ShardedWeight | None:
        """Handle of one parameter for those who must read it whole; None if the network has no such one."""
        return ShardedWeight(self.parameters[name]) if name in self.parameters else None

    @torch.no_grad()
    def write(self, read: Callable[[str, Fragment], torch.Tensor]) -> None:
        """Set every value from ``read(name, fragment) -> [numel]``."""
        # a parameter that is still whole would be read in place of its shard
        self._engine.optimizer.partition_all_parameters()
        for name, parameter in self.parameters.items():
            assert not parameter.ds_persist, name
            parameter.ds_tensor.copy_(read(name, self.fragments[name]))

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """This rank's part of each parameter, by name."""
        for name, parameter in self.parameters.items():
            # bound now: the tensor that ds_tensor is may be another one later, its values the same
            yield name, Shard(self.fragments[name].numel, parameter.ds_tensor.detach)
