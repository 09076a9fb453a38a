"""Assumed rates from which step times are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamtrain.planning.parts import BACKWARD, FORWARD, TEACHER
from streamtrain.planning.peak import Gpu, gpu_of_option

DEFAULT_GPU = gpu_of_option("h100")

# Assumptions, the same for every device and run.
# Share of the peak that large bf16 matmuls attain: 0.87 on A100, 0.80 on H100 and H200, 0.78 on B200 by the search over
# shapes in Bekman's ML Engineering book ("maximum achievable matmul FLOPS"). Those are the best shapes; 0.7 for others.
MATMUL_SHARE = 0.7
# of the FP8 peak, with a scale per row: 0.71 on H100 for the best shapes in the same table
FP8_SHARE = 0.6
# inner dimension at which a matmul spends half its time in prologue and epilogue
INNER = 128
# Share of the peak of fused attention, after rounding queries and keys up to its tiles (FlashAttention-2's tables: 0.6
# to 0.7 on A100 for long sequences in the forward and 0.1 less in the backward, about 0.4 on H100).
ATTENTION_SHARE, QUERY_TILE, KEY_TILE = 0.4, 128, 64
# share of the memory bandwidth that a memory-bound kernel attains, and seconds in which a kernel starts and drains
BANDWIDTH_SHARE, KERNEL_SECONDS = 0.8, 2e-6
# host seconds per launched kernel with its share of Python, of a call of a compiled branch, and of ZeRO-3's hooks per
# gathered module
LAUNCH_SECONDS, COMPILED_SECONDS, HOOK_SECONDS = 8e-6, 100e-6, 300e-6
# share of the link bandwidth that NCCL attains, and seconds per rank of a ring for one collective
LINK_SHARE, HOP_SECONDS = 0.8, 2e-6
# of a small all-reduce
REDUCE_SECONDS = 50e-6
# bytes/s between GPU and host in one direction, and of a disk
HOST_RATE, DISK_RATE = 25e9, 3e9
GPUS_PER_HOST = 8
# bytes/s per GPU between hosts (400 Gbit/s), and images/s that the loader of one host decodes and crops
NETWORK_RATE, LOADER_RATE = 50e9, 8000.0
# Bytes that the update reads and writes per value of a rank: norm 4, AdamW 28, copy to bf16 6; the EMA 18. The search
# for 8-bit codes needs ten times as many.
UPDATE_BYTES, EIGHT_BIT_BYTES, EMA_BYTES = 38, 400, 18
# per gathered value: received, and copied from the ranks' pieces; per value of a gradient: copied to and in the bucket;
# per value of this rank: converted to fp32 and added
GATHER_BYTES, BUCKET_BYTES, ACCUMULATE_BYTES = 6, 8, 14
# kernels of a micro-batch that no region counts, such as masks, rows, final norm and KoLeo: all operations of the whole
# network minus the regions' operations
OTHER_KERNELS = {TEACHER: 11, FORWARD: 90, BACKWARD: 60}
# kernels of an update per parameter group, and modules outside the blocks that are gathered
UPDATE_KERNELS, OTHER_MODULES = 20, 10


@dataclass(frozen=True)
class Hardware:
    """GPUs, their network, and the rate of the loader."""

    gpu: Gpu = DEFAULT_GPU
    # bytes/s per GPU between hosts, and images/s of one host's loader
    network: float = NETWORK_RATE
    loader: float = LOADER_RATE
    bf16: bool = True
    # FLOP/s that bf16 matmuls (or fp32, without bf16) of every size attain; None: predicted from peak and size
    flops: float | None = None

    @property
    def matmul_flops(self) -> float:
        """FLOP/s of a large matmul."""
        return self.flops or MATMUL_SHARE * (self.gpu.bf16 if self.bf16 else self.gpu.fp32)

    def matmul_seconds(
        self, flops: float, inner: float, num_bytes: float, dtype: Literal["default", "fp8", "fp32"] = "default"
    ) -> float:
        """Return the time of matmuls with this inner dimension; the default dtype is bf16, or fp32 without bf16."""
        # relative to the default, also if ``flops`` replaces the assumed rate
        ratio = 1.0
        if dtype == "fp8":
            ratio = FP8_SHARE * self.gpu.fp8 / (MATMUL_SHARE * self.gpu.bf16)
        elif dtype == "fp32" and self.bf16:
            ratio = self.gpu.fp32 / self.gpu.bf16
        rate = ratio * self.matmul_flops
        share = 1.0 if self.flops else inner / (inner + INNER)
        return max(flops / (rate * share), self.memory_seconds(num_bytes))

    def memory_seconds(self, num_bytes: float) -> float:
        """Return the time to read and write these bytes."""
        return num_bytes / (BANDWIDTH_SHARE * self.gpu.memory)

    def gather_rate(self, world_size: int) -> float:
        """Return the bytes/s at which a rank receives in a collective, limited by the slower of link and network."""
        rate = self.gpu.link
        if world_size > GPUS_PER_HOST:
            # the rings of a host's network cards each carry a part of the data
            rate = min(rate, GPUS_PER_HOST * self.network)
        return LINK_SHARE * rate


DEFAULT_HARDWARE = Hardware()
