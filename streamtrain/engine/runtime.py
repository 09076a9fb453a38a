"""A process's device and dtype, and its process group.

torch is imported only where it is needed, so that configuration errors are reported within a second.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from streamtrain.config.engine import EngineConfig
from streamtrain.engine.meeting import StartFacts, meet
from streamtrain.engine.rendezvous import Launch, meeting_error
from streamtrain.errors import ConfigError
from streamtrain.ops.configure import select_cpu_kernels, tune_cpu_allocator
from streamtrain.ops.cpu.features import multiplies_bf16
from streamtrain.run.logs import log_printed_lines, take_over
from streamtrain.run.machine import has_gpu_driver

if TYPE_CHECKING:
    import torch

# prefix of the warnings that DeepSpeed's op builders print, in yellow
BUILDER_WARNING = "\x1b[93m [WARNING] \x1b[0m"


@dataclass(frozen=True)
class Runtime:
    """This process in an initialised process group, with its device and the dtype of its networks."""

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
    def description(self) -> dict[str, str]:
        """Names of the device and the dtype, for logs and reports."""
        import torch

        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"
        return {"device": name, "dtype": "bf16" if self.dtype == torch.bfloat16 else "fp32"}


def choose_accelerator(config: EngineConfig, launch: Launch) -> str:
    """Return ``cuda`` or ``cpu``; call it before importing DeepSpeed, which reads ``DS_ACCELERATOR`` at import.

    Raises:
        ConfigError: if the requested device is not available.
    """
    chosen = "cuda" if uses_gpu(config, launch) else "cpu"
    os.environ["DS_ACCELERATOR"] = chosen
    return chosen


def uses_gpu(config: EngineConfig, launch: Launch) -> bool:
    """Return whether this rank computes on a GPU; errors as in ``choose_accelerator``."""
    count = count_gpus() if config.device != "cpu" else 0
    cuda = count > 0 if config.device == "auto" else config.device == "cuda"
    if cuda and count < launch.local_world_size:
        raise ConfigError(
            f"engine.device is {config.device}, but this machine has {count} GPU(s) for {launch.local_world_size} "
            "rank(s); start fewer ranks or set engine.device=cpu"
        )
    return cuda


def count_gpus() -> int:
    """Return the number of visible GPUs; torch is not loaded if there is no driver."""
    if not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


@contextmanager
def deterministic_operations() -> Iterator[None]:
    """Let torch choose only deterministic operations on a GPU, and raise where it has none.

    The backward pass of attention and scattered sums otherwise add in the order in which threads happen to run. NCCL
    sums in a fixed order for the same GPUs and version.
    """
    import torch

    # cuBLAS reads it when it is initialised; otherwise its workspaces depend on timing
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    backends, fill = torch.backends.cuda, torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    attention = backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    # filling costs time, and no code reads uninitialised memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    # The remaining backends are flash attention, whose backward has a deterministic mode, and plain matmuls for fp32.
    backends.enable_mem_efficient_sdp(False)
    backends.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
        backends.enable_mem_efficient_sdp(attention[0])
        backends.enable_cudnn_sdp(attention[1])


@contextmanager
def init_process_group(
    config: EngineConfig, launch: Launch, facts: StartFacts | None = None
) -> Iterator[Runtime]:  # fmt: skip
    """Initialise the process group, and destroy it when the ``with`` block ends without an error.

    Args:
        facts: must be equal on all ranks.

    Raises:
        ConfigError: if the requested device is not available, this DeepSpeed is not supported, or the ranks cannot
            meet.
        FailedStart: the ranks have met, and one of them has an error or differs from rank 0.
    """
    cuda = choose_accelerator(config, launch) == "cuda"
    if not cuda:
        tune_cpu_allocator()
    # without nvcc, DeepSpeed prints 7 lines about operations that are not used here
    with log_printed_lines(BUILDER_WARNING, "deepspeed"):
        import deepspeed
        import torch

        from streamtrain.engine import deepspeed_compat
        from streamtrain.ops.cpu.build import load, set_enabled

        deepspeed_compat.check_version()
        deepspeed_compat.disable_shared_memory_all_reduce()
    device = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(config.cpu_threads or launch.cores)
    take_over(deepspeed.utils.logger)
    deepspeed_compat.replace_gather_handles()
    # DeepSpeed calls two collectives by deprecated names, in every step
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    backend = "nccl" if cuda else "gloo"
    timeout = timedelta(seconds=config.collective_timeout_seconds)
    dtype = torch.bfloat16 if uses_bf16(config, cuda) else torch.float32
    if not cuda and config.cpu_kernels:
        # compiling takes half a minute, in which no other rank should wait
        load(dtype)
    store = meet(launch, timeout, facts)
    try:
        # DeepSpeed uses a group that exists
        torch.distributed.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )
        deepspeed.init_distributed(backend, verbose=False, auto_mpi_discovery=False, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise meeting_error(error, launch, timeout) from None
    torch.distributed.distributed_c10d._set_pg_timeout(timeout, deepspeed_compat.cloned_world_group())
    if not cuda:
        select_cpu_kernels(config.cpu_kernels, dtype)
    try:
        with deterministic_operations() if config.deterministic and cuda else nullcontext():
            yield Runtime(launch, device, dtype)
    finally:
        set_enabled(True)
    # not after an error: the other ranks would not get here, and the launcher ends all of them
    torch.distributed.destroy_process_group()


def uses_bf16(config: EngineConfig, cuda: bool) -> bool:
    """Return whether the networks compute in bf16 on a GPU (``cuda``) or on this CPU."""
    return (cuda or multiplies_bf16()) if config.dtype == "auto" else config.dtype == "bf16"
