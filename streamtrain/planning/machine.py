"""The machine that a run is planned for, and the time that its steps take there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from streamtrain.config.tree import Config
from streamtrain.planning.hardware import DEFAULT_HARDWARE, DISK_RATE, Hardware
from streamtrain.planning.memory import Plan, plan
from streamtrain.planning.sizes import CPU_KERNELS, Implementation, StoredImages
from streamtrain.planning.time import StepTime, predict

# Assumed FLOP/s of one core by the most capable feature in use: with the CPU kernels, and without. AMX and AVX-512 with
# kernels follow from docs/performance.md; the others are guesses.
CORE_FLOPS = {
    "amx_bf16": (0.55e12, 0.2e12),
    "avx512_bf16": (0.25e12, 0.1e12),
    "avx512": (0.15e12, 0.1e12),
    "avx2": (0.05e12, 0.05e12),
    "none": (0.02e12, 0.02e12),
}
# bytes/s between the ranks of a CPU
GATHERED_RATE = 200e9
# of one core: decoding and cropping an image, operations of one block, and bytes that an update reads and writes
IMAGE_SECONDS, CPU_BLOCK_SECONDS, UPDATE_RATE = 7e-3, 1e-3, 5e9


def core_flops(bf16: bool, features: Collection[str], has_kernels: bool) -> float:
    """Return the FLOP/s to assume of one core with these ``features`` (``ops.cpu.features``)."""
    usable = (name for name in CORE_FLOPS if name in features and (bf16 or not name.endswith("bf16")))
    with_kernels, without = CORE_FLOPS[next(usable, "none")]
    return with_kernels if has_kernels else without


@dataclass(frozen=True)
class StepEstimate:
    """The estimated time of one optimiser step."""

    seconds: float
    # on GPUs: the time by operation
    by_operation: StepTime | None = None


@dataclass(frozen=True)
class Machine:
    """Ranks, the devices they compute on, and the memory there is for them."""

    ranks: int
    on_gpu: bool = True
    # compute in bf16, otherwise in fp32
    bf16: bool = True
    # implementation of a block's branches that the CPU supports
    supported: Implementation = CPU_KERNELS
    # bytes of one GPU and of one host; None: not checked
    gpu_memory: int | None = None
    host_memory: int | None = None
    # rates of the GPUs, their network and the loader
    hardware: Hardware = DEFAULT_HARDWARE
    # FLOP/s that a rank without a GPU attains
    flops: float = CORE_FLOPS["none"][0]
    # CPU cores of one rank
    cores: int = 1
    # the stored images; None: unknown
    images: StoredImages | None = None

    def plan(self, config: Config) -> Plan:
        """Plan one rank; raises as ``planning.memory.plan``."""
        return plan(
            config, self.ranks, on_gpu=self.on_gpu, bf16=self.bf16, supported=self.supported,
            images=self.images, cores=self.cores, host_memory=self.host_memory,
        )  # fmt: skip

    def fits(self, planned: Plan) -> bool:
        """Return whether the plan fits into each GPU and each host."""
        on_device = not self.on_gpu or self.gpu_memory is None or planned.gpu_bytes <= self.gpu_memory
        return on_device and (self.host_memory is None or planned.host_bytes <= self.host_memory)

    @property
    def attained_flops(self) -> float:
        """FLOP/s that the matmuls of one rank attain."""
        return self.hardware.matmul_flops if self.on_gpu else self.flops

    def estimate_step(self, config: Config, planned: Plan) -> StepEstimate:
        """Estimate the time of one optimiser step."""
        if self.on_gpu:
            time = predict(config, self.ranks, self.hardware, planned.transfers)
            return StepEstimate(time.seconds, time)
        _, accumulation = config.batch_split(self.ranks)
        seconds = planned.flops_per_step / self.ranks / self.flops
        # without a GPU, only moments on disk are transferred
        seconds += planned.all_gather_bytes_per_step / GATHERED_RATE + planned.transfers.moments / DISK_RATE
        images = accumulation * config.data.micro_batch
        # on a CPU the loader uses the same cores
        seconds += images * IMAGE_SECONDS / self.cores + accumulation * config.model.depth * CPU_BLOCK_SECONDS
        return StepEstimate(seconds + planned.state_bytes / UPDATE_RATE / self.cores)
