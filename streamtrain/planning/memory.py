"""The memory, disk space and traffic of a run, computed from the configuration alone, without torch or a device.

Model states are exact to the byte. Activations and temporaries are counted tensor by tensor, following what autograd
saves. The libraries' own memory (contexts, communicators, decoders) is an estimate, labelled "allowance".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from streamtrain.config.tree import Config
from streamtrain.planning.activations import activations
from streamtrain.planning.flops import step_flops
from streamtrain.planning.gpu_buffers import gpu_buffers, offloaded_numels
from streamtrain.planning.host import (
    COPY_SHARE,
    checkpoint_copy,
    disk_space,
    evaluation_buffers,
    host_buffers,
    kept_memory,
)
from streamtrain.planning.parts import (
    ALWAYS,
    AVERAGE,
    BACKWARD,
    CHECKPOINT,
    EVALUATION,
    LOSS,
    OPTIMISER,
    PHASES,
    TARGETS,
    TEACHER,
    Location,
    Part,
    part,
)
from streamtrain.planning.shapes import backbone_shapes, block_shapes, parameter_shapes, partition, trained_shapes
from streamtrain.planning.sizes import CPU_KERNELS, Implementation, Sizes, StoredImages

# a CUDA context with its kernels, cuBLAS' workspace and NCCL's buffers
CONTEXT_BYTES = 1_500_000_000
# the CUDA allocator's overhead, as a share of the model states on the device
FRAGMENTATION = 0.03
RANKS_PER_HOST = 8
# values per staged chunk of moments in files, of 8-bit moments, and of moments or EMA in host memory
STAGED, EIGHT_BIT_STAGED, HOST_STAGED = 16 * 2**20, 4 * 2**20, 8 * 2**20
# chunks of host memory on the device at a time, and bytes per value of the search for 8-bit codes
HOST_CHUNKS, EIGHT_BIT_SEARCH_BYTES = 3, 56


@dataclass(frozen=True)
class Transfers:
    """Bytes that one rank transfers to and from its host or a disk in an optimiser step, half of them each way."""

    moments: int = 0
    ema: int = 0
    # offloaded in the forward, loaded in the backward
    activations: int = 0


@dataclass(frozen=True)
class Plan:
    """All buffers of one rank, and the FLOPs and traffic of an optimiser step."""

    parts: tuple[Part, ...]
    # without a GPU, "gpu" is the network's share of the process
    on_gpu: bool
    ranks_per_host: int
    # of all ranks, including recomputation
    flops_per_step: float
    # received by one rank
    all_gather_bytes_per_step: int
    transfers: Transfers
    # of the student: its backbone, and the backbone with the heads
    num_backbone_parameters: int
    num_parameters: int

    def at(self, phase: str, location: Location = "gpu") -> int:
        """Return the bytes of one rank in ``location`` during ``phase``."""
        return sum(p.num_bytes for p in self.parts if p.location == location and {ALWAYS, phase} & set(p.when))

    def rank_bytes_at(self, phase: str) -> int:
        """Return the memory of one rank during ``phase``: of its GPU, or without a GPU of its process."""
        return self.at(phase) + (0 if self.on_gpu else self.at(phase, "host"))

    @property
    def transfer_bytes_per_step(self) -> int:
        """Bytes that one rank transfers between the device and its host or a disk."""
        return self.transfers.moments + self.transfers.ema + self.transfers.activations

    @property
    def peak_phase(self) -> str:
        """The phase with the highest memory of a rank."""
        return max(PHASES, key=self.rank_bytes_at)

    @property
    def rank_bytes(self) -> int:
        """Peak memory of one rank: of its GPU, or without a GPU of its process."""
        return self.rank_bytes_at(self.peak_phase)

    @property
    def step_bytes(self) -> int:
        """Peak memory of one rank until its last step, as in its metrics; without the last checkpoint."""
        return max(self.rank_bytes_at(phase) for phase in PHASES if phase != CHECKPOINT)

    @property
    def gpu_bytes(self) -> int:
        """Peak memory of one GPU; 0 without GPUs."""
        return self.rank_bytes if self.on_gpu else 0

    @property
    def rank_host_bytes(self) -> int:
        """Peak host memory of one rank."""
        return max(self.at(phase, "host") for phase in PHASES) if self.on_gpu else self.rank_bytes

    @property
    def host_bytes(self) -> int:
        """Peak memory of one host with all its ranks."""
        return self.ranks_per_host * self.rank_host_bytes

    @property
    def disk_bytes(self) -> int:
        """Disk space of all ranks: kept checkpoints, the one being written, and moments in files."""
        return self.at(ALWAYS, "disk")

    @property
    def state_bytes(self) -> int:
        """Model states of one rank in all locations: values, masters, gradients, moments and EMA."""
        return sum(part.num_bytes for part in self.parts if part.name in STATES)


STATES = ("student values", "frozen values", "masters", "gradients", "moments", "teacher values", "averages")


def plan(
    config: Config,
    world_size: int,
    *,
    on_gpu: bool = True,
    bf16: bool = True,
    supported: Implementation = CPU_KERNELS,
    images: StoredImages | None = None,
    cores: int = 1,
    host_memory: int | None = None,
) -> Plan:
    """Plan one of ``world_size`` ranks.

    Args:
        on_gpu: compute on GPUs; otherwise "gpu" means the network's share of host memory.
        bf16: compute in bf16; otherwise in fp32.
        supported: the block implementation that the CPUs support; the configuration may select the reference.
        images: the stored images; None: ``ASSUMED_IMAGES``.
        cores: of one rank, for the threads that ``engine.cpu_threads`` does not set.
        host_memory: bytes of one host, which decide whether checkpoints are written from a copy; None: enough.

    Raises:
        ConfigError: if micro-batch x ranks does not divide the global batch.
    """
    sizes = Sizes.of(config, world_size, on_gpu, bf16, supported, images, cores)
    parts = [*_states(sizes), *_gathers(sizes), *activations(sizes), *_prototypes(sizes), *_step(sizes)]
    parts += [*host_buffers(sizes), *evaluation_buffers(sizes), *gpu_buffers(sizes), *disk_space(sizes)]
    parts += kept_memory(sizes, parts)
    planned = Plan(
        tuple(part for part in parts if part.num_bytes),
        on_gpu,
        min(world_size, RANKS_PER_HOST) if on_gpu else world_size,
        step_flops(config, world_size).executed,
        _all_gather_bytes(sizes),
        _transfers(sizes),
        sum(math.prod(shape) for shape in backbone_shapes(config.model).values()),
        sizes.numel,
    )
    copy = checkpoint_copy(sizes)
    if not config.run.save_in_background or not _has_room(planned, copy, host_memory):
        return planned
    return replace(planned, parts=(*planned.parts, copy))


def _has_room(planned: Plan, copy: Part, host_memory: int | None) -> bool:
    """Return whether the writer of checkpoints will find memory for the copies of a host's ranks."""
    if host_memory is None:
        return True
    return planned.ranks_per_host * copy.num_bytes < COPY_SHARE * (host_memory - planned.host_bytes)


def _states(s: Sizes) -> Iterator[Part]:
    engine, shard = s.config.engine, (s.shard, "values of this rank")
    fp32 = s.item == 4
    yield part("student values", "gpu", ALWAYS, shard, (s.item, "B"))
    # of both networks
    yield part("frozen values", "gpu", ALWAYS, (s.frozen_shard, "values of this rank"), (s.item, "B"))
    # in fp32 the values are the masters
    yield part("masters", "gpu", ALWAYS, shard, (0 if fp32 else 4, "B"))
    yield part("gradients", "gpu", ALWAYS, shard, (4, "B"))
    if engine.moments == "8bit":
        # each flat tensor is padded to blocks of 256 values, which have one scale each
        blocks = sum(-(-numel // 256) for numel in s.flats)
        yield part("moments", "gpu", ALWAYS, (blocks, "blocks"), (2 * 260, "B"))
    else:
        in_memory: Location = "host" if s.on_gpu and engine.moments == "host" else "gpu"
        location: Location = "disk" if engine.moments == "disk" else in_memory
        offloaded = 0 if engine.moments == "device" else sum(offloaded_numels(s))
        yield part("moments", "gpu", ALWAYS, (s.shard - offloaded, "values of this rank"), (8, "B"))
        ranks = s.world_size if location == "disk" else 1
        yield part("moments", location, ALWAYS, (offloaded, "values"), (8 * ranks, "B"))
    on_host = s.on_gpu and s.config.teacher.average == "host"
    yield part("teacher values", "gpu", ALWAYS, shard, (0 if fp32 and not on_host else s.item, "B"))
    yield part("averages", "host" if on_host else "gpu", ALWAYS, shard, (4, "B"))
    objective = s.config.objective
    frozen = {}
    if objective.gram.is_active:
        frozen["Gram teacher"] = parameter_shapes(s.config)
    if objective.anchor.is_active:
        # it shares what LoRA freezes
        frozen["anchor"] = trained_shapes(s.config)
    for name, shapes in frozen.items():
        backbone = {n: shape for n, shape in shapes.items() if n.startswith("backbone.")}
        own = partition(backbone, s.config, s.world_size).shard_numel
        yield part(name, "gpu", ALWAYS, (own, "values of this rank"), (s.item, "B"))
    if (backbone_config := s.config.teacher.backbone) is not None:
        own = partition(backbone_shapes(backbone_config), s.config, s.world_size).shard_numel
        yield part("feature teacher", "gpu", ALWAYS, (own, "values of this rank"), (s.item, "B"))


def _gathers(s: Sizes) -> Iterator[Part]:
    engine, values = s.config.engine, (s.block, "values")
    yield part("gradient of a block", "gpu", BACKWARD, (s.trained_block, "values"), (s.item, "B"))
    if s.world_size == 1:
        # a single rank neither gathers parameters nor reduces gradients
        return
    # and the buffer of the gather that is being split into parameters
    copies = (engine.live_blocks + 1 if s.on_gpu else 1, "blocks")
    phases = (TEACHER, BACKWARD)
    if (teacher := s.config.teacher.backbone) is not None:
        phases = (EVALUATION, BACKWARD)
        block = sum(map(math.prod, block_shapes(teacher).values()))
        yield part("gathered teacher blocks", "gpu", TEACHER, copies, (block, "values"), (s.item, "B"))
    yield part("gathered blocks", "gpu", phases, copies, values, (s.item, "B"))
    # gradients wait until the next one would exceed the bucket, while an earlier bucket is reduced; a gradient larger
    # than the bucket is reduced alone
    full = min(max(engine.reduce_bucket_bytes // s.item, s.largest_trained), s.trained_numel)
    yield part("gradients to reduce", "gpu", BACKWARD, (full, "values"), (s.item, "B"))
    yield part("gradients being reduced", "gpu", BACKWARD, (full, "values"), (s.item, "B"))
    yield part("reduced gradients", "gpu", BACKWARD, (full / s.world_size, "values"), (s.item, "B"))


def _prototypes(s: Sizes) -> Iterator[Part]:
    if not s.heads:
        return
    # a chunk has at least 64 prototypes, which with many rows may exceed chunk_bytes
    chunk = max(
        s.config.objective.chunk_size(on_gpu=s.on_gpu), *(64 * 4 * s.accumulation * rows for _, _, _, rows in s.heads)
    )
    largest = max(head.prototypes * head.bottleneck for _, head, _, _ in s.heads)
    # a single rank uses its shard
    gathered = (largest if s.world_size > 1 else 0, "values")
    yield part("teacher's prototypes gathered", "gpu", (TARGETS, LOSS), gathered, (s.item, "B"))
    yield part("student's prototypes gathered", "gpu", LOSS, gathered, (s.item, "B"))
    for name, head, _, _ in s.heads:
        values = (head.prototypes * head.bottleneck, "values")
        yield part(f"{name} prototypes' gradient", "gpu", (LOSS, BACKWARD), values, (s.item, "B"))
        yield part(f"{name} column scalings", "gpu", ALWAYS, (head.prototypes, "prototypes"), (4, "B"))
    # in the loss: a chunk of logits shared by student and teacher, the student rows' targets, and their product
    yield part("prototype chunk", "gpu", (TARGETS, LOSS), (chunk, "B"), (3, "copies"))


def _step(s: Sizes) -> Iterator[Part]:
    engine = s.config.engine
    if engine.moments == "8bit":
        values = (min(EIGHT_BIT_STAGED, max(s.flats)), "values")
        yield part("8-bit staging", "gpu", OPTIMISER, values, (EIGHT_BIT_SEARCH_BYTES, "B"))
    elif engine.moments == "disk":
        yield part("moments' staging", "gpu", OPTIMISER, (min(STAGED, max(s.flats)), "values"), (8, "B"))
    staged = (HOST_CHUNKS, "chunks"), (min(HOST_STAGED, max(s.flats)), "values")
    if s.on_gpu and engine.moments == "host":
        yield part("moments' staging", "gpu", OPTIMISER, *staged, (8, "B"))
    if s.on_gpu and s.config.teacher.average == "host":
        yield part("averages' staging", "gpu", AVERAGE, *staged, (4, "B"))
    if s.on_gpu:
        device = sum(p.num_bytes for p in _states(s) if p.location == "gpu")
        yield part("context (allowance)", "gpu", ALWAYS, (CONTEXT_BYTES, "B"))
        yield part("fragmentation (allowance)", "gpu", ALWAYS, (device, "B"), (FRAGMENTATION, ""))


def _all_gather_bytes(s: Sizes) -> int:
    """Return the bytes one rank receives: the student for forward and backward, and the teacher once."""
    heads = sum(head.prototypes * head.bottleneck for _, head, _, _ in s.heads)
    teacher = s.numel
    if (backbone := s.config.teacher.backbone) is not None:
        teacher = sum(map(math.prod, backbone_shapes(backbone).values()))
    # the targets need the teacher's prototypes once more, once a step
    values = s.accumulation * (2 * s.numel + teacher) + heads
    return round(values * s.item * (s.world_size - 1) / s.world_size)


def _transfers(s: Sizes) -> Transfers:
    moments = sum(p.num_bytes for p in _states(s) if p.name == "moments" and p.location != "gpu")
    if s.config.engine.moments == "disk":
        moments //= s.world_size
    ema = sum(p.num_bytes for p in _states(s) if p.name == "averages" and p.location == "host")
    offloaded = sum(p.num_bytes for p in activations(s) if p.location == "host")
    return Transfers(2 * moments, 2 * ema, 2 * s.accumulation * offloaded)
