"""Where a process stands: its rank, device and number format, and the process group it joins.

Nothing here imports torch before it is needed, so that a faulty configuration is told within a second.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from streamtrain.config.engine import EngineConfig
from streamtrain.errors import ConfigError
from streamtrain.ops.configure import select_cpu_kernels, tune_cpu_allocator
from streamtrain.ops.cpu.features import multiplies_bf16

if TYPE_CHECKING:
    import torch

# What DeepSpeed warns of and is meant so. Its hooks look into tuples and dicts only, which is why what must pass by
# them is in dataclasses; the optimiser it has not tested is ours, and tested here.
INTENDED = ("unknown inputs or outputs type", "ZeRO with an untested optimizer")


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process (``deepspeed``, ``torchrun``, ``srun`` + variables, or nothing)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``; a plain ``python`` start is one rank of one."""
        if "RANK" not in os.environ:
            # the process group reads these; a plain start has nobody to meet, so any free port will do
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                alone: dict[str, object] = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
                alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
            os.environ.update({key: str(value) for key, value in alone.items()})
        world_size = int(os.environ["WORLD_SIZE"])
        # DeepSpeed's launcher gives the ranks of this node as LOCAL_SIZE, torchrun as LOCAL_WORLD_SIZE
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size
        return cls(int(os.environ["RANK"]), world_size, int(os.environ.get("LOCAL_RANK", 0)), int(local))

    @property
    def cores(self) -> int:
        """Cores of this process: those it may use, shared evenly with the node's other ranks."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)


@dataclass(frozen=True)
class Runtime:
    """A joined process group."""

    launch: Launch
    device: torch.device
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def described(self) -> dict[str, str]:
        """Where and how the network computes, for people and for the report of a run."""
        import torch

        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"
        return {"device": name, "dtype": "bf16" if self.dtype == torch.bfloat16 else "fp32"}

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.rank == 0:
            print(line, flush=True)


def choose_accelerator(config: EngineConfig, launch: Launch) -> str:
    """``cuda`` or ``cpu``; call it before anything imports DeepSpeed, which decides by a variable at that moment.

    Raises:
        ConfigError: if the device asked for is not there.
    """
    import torch

    cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    if cuda and torch.cuda.device_count() < launch.local_world_size:
        raise ConfigError(
            f"engine.device is cuda, but this machine shows {torch.cuda.device_count()} GPU(s) for "
            f"{launch.local_world_size} rank(s); start fewer ranks or set engine.device=cpu"
        )
    chosen = "cuda" if cuda else "cpu"
    os.environ["DS_ACCELERATOR"] = chosen
    return chosen


@contextmanager
def joined(config: EngineConfig, launch: Launch) -> Iterator[Runtime]:
    """Join the process group, and leave it at the end of a ``with`` block that succeeded.

    Raises:
        ConfigError: if the device asked for is not there.
    """
    cuda = choose_accelerator(config, launch) == "cuda"
    if not cuda:
        tune_cpu_allocator()
    import deepspeed
    import torch

    from streamtrain.ops.cpu.build import set_enabled

    device = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(config.cpu_threads or launch.cores)
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.utils.logger.addFilter(lambda record: not any(part in record.getMessage() for part in INTENDED))
    # On CPU DeepSpeed would compile a shared-memory all-reduce at the first start. A process killed meanwhile leaves
    # a lock file behind, at which every later start waits for ever; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls two collectives by names that torch is about to change, and a user can do nothing about it
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    backend = "nccl" if cuda else "gloo"
    timeout = timedelta(seconds=config.collective_timeout_seconds)
    deepspeed.init_distributed(backend, verbose=False, auto_mpi_discovery=False, timeout=timeout)
    # DeepSpeed's own collectives run in a copy of the group of all ranks, which it makes without regard to the time-out
    torch.distributed.distributed_c10d._set_pg_timeout(timeout, deepspeed.utils.groups._clone_world_group())
    dtype = torch.bfloat16 if in_16_bits(config, cuda) else torch.float32
    if not cuda:
        select_cpu_kernels(config.cpu_kernels, dtype)
    try:
        yield Runtime(launch, device, dtype)
    finally:
        set_enabled(True)
    # after an error the other ranks are not at this point: leaving is then the launcher's work
    torch.distributed.destroy_process_group()


def in_16_bits(config: EngineConfig, cuda: bool) -> bool:
    """Whether the networks compute in bf16 on such a device."""
    return (cuda or multiplies_bf16()) if config.dtype == "auto" else config.dtype == "bf16"
