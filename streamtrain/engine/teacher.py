"""The teacher: an exponential moving average of the student's masters, shard by shard, without communication."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from streamtrain.engine.frozen import ShardedNetwork
from streamtrain.engine.moments import CHUNK
from streamtrain.engine.zero import Fragment, Shard, Student


class Teacher(ShardedNetwork):
    """A network partitioned like the student, whose shards follow the student's fp32 masters.

    The averages are kept in fp32, one flat tensor beside each of the student's; the network computes from
    shards in its own number format, which are the same memory where that is fp32.
    """

    def __init__(
        self, module: torch.nn.Module, leaf: type[torch.nn.Module], student: Student, settings: dict[str, Any],
        on_host: bool = False,
    ) -> None:
        """``on_host``: the averages lie in (pinned) host memory and visit the device chunk by chunk."""
        super().__init__(module, leaf, settings)
        self._student = student
        masters = student.master_groups
        away = on_host and masters[0].is_cuda
        self._values = [torch.empty_like(master, dtype=self._dtype) for master in masters]
        for name, parameter in self.parameters.items():
            group, offset, numel = student.position(name)
            assert parameter.ds_tensor.numel() == numel, name
            # the engine gathers from ds_tensor: let it look into the flat tensor that the update writes
            parameter.ds_tensor.data = self._values[group].narrow(0, offset, numel)
        # only now, when the memory of the engine's own tensors is free again
        if self._dtype == masters[0].dtype and not away:
            self._averages = self._values
        else:
            home = torch.device("cpu") if away else masters[0].device
            self._averages = [torch.empty(m.shape, dtype=m.dtype, device=home, pin_memory=away) for m in masters]

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).ds_tensor.dtype

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """``average = momentum * average + (1 - momentum) * master``, on this rank's shards only."""
        self.release()
        for average, value, master in zip(self._averages, self._values, self._student.master_groups, strict=True):
            for home, own, newest in zip(average.split(CHUNK), value.split(CHUNK), master.split(CHUNK), strict=True):
                # where the averages are on the host, copies in both directions wait for nobody here
                moved = home.to(newest.device, non_blocking=True).lerp_(newest.detach(), 1.0 - momentum)
                if moved.data_ptr() != home.data_ptr():
                    home.copy_(moved, non_blocking=True)
                if own.data_ptr() != home.data_ptr():
                    own.copy_(moved)

    def average(self, name: str) -> torch.Tensor:
        """``[numel]`` fp32 view of this rank's fragment of the average of parameter ``name``."""
        self._arrive()
        return self._view(name)

    def shards(self) -> dict[str, Shard]:
        """What a checkpoint keeps of this rank: ``ema/name``."""
        self._arrive()
        numels = {name: self._student.fragments[name].numel for name in self.parameters}
        return {f"ema/{name}": Shard(numel, partial(self._view, name)) for name, numel in numels.items()}

    @torch.no_grad()
    def write(self, read: Callable[[str, Fragment], torch.Tensor]) -> None:
        """Set the averages from ``read(ema/name, fragment) -> [numel]``."""
        for name in self.parameters:
            self._view(name).copy_(read(f"ema/{name}", self._student.fragments[name]))
        self.update(1.0)

    def _view(self, name: str) -> torch.Tensor:
        group, offset, numel = self._student.position(name)
        return self._averages[group].narrow(0, offset, numel)

    def _arrive(self) -> None:
        """Wait for copies that are on their way to the host."""
        if self._averages[0].is_pinned():
            torch.cuda.synchronize()
