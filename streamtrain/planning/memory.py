"""The memory, disk space and traffic of a run, computed from the configuration alone, without torch or a device.

Model states are exact to the byte. Activations and temporaries are counted tensor by tensor, following what autograd
saves. The libraries' own memory (contexts, communicators, decoders) is an estimate, labelled "allowance".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from streamtrain.config.masks import max_rows
from streamtrain.config.model import HeadConfig
from streamtrain.config.tree import Config
from streamtrain.planning.flops import step_flops
from streamtrain.planning.shapes import block_shapes, parameter_shapes, partition

Location = Literal["gpu", "host", "disk"]
# of a block's branches (``streamtrain/ops/branches.py``)
Implementation = Literal["cpu_kernels", "reference"]
CPU_KERNELS: Implementation = "cpu_kernels"
# a CUDA context with its kernels, cuBLAS' workspace and NCCL's buffers
CONTEXT_BYTES = 1_500_000_000
# Python with torch, DeepSpeed and DALI, measured by `tools/bench.py memory`
PROCESS_BYTES = 800_000_000
# the CUDA allocator's overhead, as a share of the model states on the device
FRAGMENTATION = 0.03
RANKS_PER_HOST = 8
# values per staged chunk of offloaded moments or EMA, and bytes per value of the search for 8-bit codes
STAGED, EIGHT_BIT_STAGED, EIGHT_BIT_SEARCH_BYTES = 16 * 2**20, 4 * 2**20, 56

ALWAYS = "always"
TEACHER, TARGETS, LOSS = "teacher pass", "targets", "prototype loss"
BACKWARD, OPTIMISER, AVERAGE = "backward", "optimiser step", "average update"
PHASES = (TEACHER, TARGETS, LOSS, BACKWARD, OPTIMISER, AVERAGE)


@dataclass(frozen=True)
class Part:
    """One buffer of a rank."""

    name: str
    location: Location
    num_bytes: int
    # phases in which it exists, or ALWAYS
    when: tuple[str, ...]
    # how num_bytes is computed
    arithmetic: str


@dataclass(frozen=True)
class Plan:
    """All buffers of one rank, and the FLOPs and traffic of an optimiser step."""

    parts: tuple[Part, ...]
    ranks_per_host: int
    # of all ranks, including recomputation
    flops_per_step: float
    # received by one rank
    all_gather_bytes_per_step: int
    # transferred by one rank between the device and the host or disk
    transfer_bytes_per_step: int
    num_parameters: int

    def at(self, phase: str, location: Location = "gpu") -> int:
        """Return the bytes of one rank in ``location`` during ``phase``."""
        return sum(p.num_bytes for p in self.parts if p.location == location and {ALWAYS, phase} & set(p.when))

    @property
    def peak_phase(self) -> str:
        """The phase with the highest device memory."""
        return max(PHASES, key=self.at)

    @property
    def gpu_bytes(self) -> int:
        """Peak memory of one device."""
        return self.at(self.peak_phase)

    @property
    def host_bytes(self) -> int:
        """Peak memory of one host with all its ranks."""
        return self.ranks_per_host * max(self.at(phase, "host") for phase in PHASES)

    @property
    def disk_bytes(self) -> int:
        """Disk space of all ranks: kept checkpoints, the one being written, and moments in files."""
        return self.at(ALWAYS, "disk")

    @property
    def state_bytes(self) -> int:
        """Model states of one rank in all locations: values, masters, gradients, moments and EMA."""
        return sum(part.num_bytes for part in self.parts if part.name in STATES)


STATES = ("student values", "masters", "gradients", "moments", "teacher values", "averages")


def plan(
    config: Config, world_size: int, *, on_gpu: bool = True, bf16: bool = True, supported: Implementation = CPU_KERNELS
) -> Plan:
    """Plan one of ``world_size`` ranks.

    Args:
        on_gpu: compute on GPUs; otherwise "gpu" means the network's share of host memory.
        bf16: compute in bf16; otherwise in fp32.
        supported: the block implementation that the CPUs support; the configuration may select the reference.

    Raises:
        ConfigError: if micro-batch x ranks does not divide the global batch.
    """
    sizes = _Sizes.of(config, world_size, on_gpu, bf16, supported)
    parts = [*_states(sizes), *_gathers(sizes), *_activations(sizes), *_prototypes(sizes), *_step(sizes), *_host(sizes)]
    parts += _disk(sizes)
    return Plan(
        tuple(part for part in parts if part.num_bytes),
        min(world_size, RANKS_PER_HOST),
        step_flops(config, world_size).executed,
        _all_gather_bytes(sizes),
        _transfer_bytes(sizes),
        sizes.numel,
    )


@dataclass(frozen=True)
class _Sizes:
    """Sizes used by several parts."""

    config: Config
    world_size: int
    on_gpu: bool
    implementation: Implementation
    # bytes per value of the dtype that the networks compute in
    item: int
    accumulation: int
    # values of all parameters, and of this rank's shards
    numel: int
    shard: int
    # values of each flat tensor of this rank, of the largest parameter, and of a block
    flats: tuple[int, ...]
    largest_whole: int
    block: int
    # tokens of a global and of a local crop
    global_tokens: int
    local_tokens: int
    masked_rows: int

    @classmethod
    def of(cls, config: Config, world_size: int, on_gpu: bool, bf16: bool, supported: Implementation) -> _Sizes:
        _, accumulation = config.batch_split(world_size)
        part = partition(parameter_shapes(config), config, world_size)
        prefix = 1 + config.model.num_registers
        sides = [size // config.model.patch_size for size in (config.crops.global_size, config.crops.local_size)]
        crops, batch = config.crops, config.data.micro_batch
        block = sum(map(math.prod, block_shapes(config.model).values()))
        rows = max_rows(config.masks, batch, crops.global_count, sides[0] ** 2, math.gcd(batch, config.masks.group))
        return cls(
            config, world_size, on_gpu, _implementation(config, on_gpu, supported), 2 if bf16 else 4, accumulation,
            part.numel, part.shard_numel, part.flat_numels, part.largest_numel, block,
            prefix + sides[0] ** 2, prefix + sides[1] ** 2, rows,
        )  # fmt: skip

    @property
    def images(self) -> tuple[int, int]:
        """Number of global and of local crops of a micro-batch."""
        batch = self.config.data.micro_batch
        return self.config.crops.global_count * batch, self.config.crops.local_count * batch

    @property
    def tokens(self) -> int:
        """Number of the student's tokens in a micro-batch."""
        return self.images[0] * self.global_tokens + self.images[1] * self.local_tokens

    @property
    def kept_tokens(self) -> int:
        """Number of these tokens that drop-path keeps in a branch."""
        kept = [max(1, round((1 - self.config.model.drop_path) * images)) if images else 0 for images in self.images]
        return kept[0] * self.global_tokens + kept[1] * self.local_tokens

    @property
    def heads(self) -> list[tuple[str, HeadConfig, int, int]]:
        """Name, configuration, student rows and teacher rows (of one micro-batch) of each head."""
        objective = self.config.objective
        heads = [("global", objective.global_loss.head, sum(self.images), self.images[0])]
        if objective.patch_loss.kind == "ibot":
            heads.append(("patch", objective.patch_loss.head, self.masked_rows, self.masked_rows))
        return heads


def _implementation(config: Config, on_gpu: bool, supported: Implementation) -> Implementation:
    """Return the implementation of a block's branches that ``ops/branches.py`` will choose."""
    model, engine = config.model, config.engine
    if on_gpu or not engine.cpu_kernels or engine.fp8 or engine.compiles(on_gpu=False):
        return "reference"
    is_tileable = all(width % 32 == 0 for width in (model.dim, model.hidden, model.dim // model.num_heads))
    return supported if is_tileable else "reference"


def _part(name: str, location: Location, when: tuple[str, ...] | str, *factors: tuple[float, str]) -> Part:
    """Return a part of the product of ``factors`` in bytes, each with its unit for the printed arithmetic."""
    when = (when,) if isinstance(when, str) else when
    arithmetic = " x ".join(f"{value:,.15g} {unit}" for value, unit in factors)
    return Part(name, location, round(math.prod(value for value, _ in factors)), when, arithmetic)


def _states(s: _Sizes) -> Iterator[Part]:
    engine, shard = s.config.engine, (s.shard, "values of this rank")
    fp32 = s.item == 4
    yield _part("student values", "gpu", ALWAYS, shard, (s.item, "B"))
    # in fp32 the values are the masters
    yield _part("masters", "gpu", ALWAYS, shard, (0 if fp32 else 4, "B"))
    yield _part("gradients", "gpu", ALWAYS, shard, (4, "B"))
    if engine.moments == "8bit":
        # each flat tensor is padded to blocks of 256 values, which have one scale each
        blocks = sum(-(-numel // 256) for numel in s.flats)
        yield _part("moments", "gpu", ALWAYS, (blocks, "blocks"), (2 * 260, "B"))
    else:
        in_memory: Location = "host" if s.on_gpu and engine.moments == "host" else "gpu"
        location: Location = "disk" if engine.moments == "disk" else in_memory
        # with a ratio below 1 the device keeps the moments of some whole blocks of each flat tensor
        kept = sum(int((1.0 - engine.moments_ratio) * numel) // 256 * 256 for numel in s.flats)
        offloaded = 0 if engine.moments == "device" else s.shard - kept
        yield _part("moments", "gpu", ALWAYS, (s.shard - offloaded, "values of this rank"), (8, "B"))
        ranks = s.world_size if location == "disk" else 1
        yield _part("moments", location, ALWAYS, (offloaded, "values"), (8 * ranks, "B"))
    on_host = s.on_gpu and s.config.teacher.average == "host"
    yield _part("teacher values", "gpu", ALWAYS, shard, (0 if fp32 and not on_host else s.item, "B"))
    yield _part("averages", "host" if on_host else "gpu", ALWAYS, shard, (4, "B"))
    if s.config.objective.gram.is_active:
        backbone = {n: shape for n, shape in parameter_shapes(s.config).items() if n.startswith("backbone.")}
        own = partition(backbone, s.config, s.world_size).shard_numel
        yield _part("Gram teacher", "gpu", ALWAYS, (own, "values of this rank"), (s.item, "B"))


def _gathers(s: _Sizes) -> Iterator[Part]:
    engine, values = s.config.engine, (s.block, "values")
    yield _part("gradient of a block", "gpu", BACKWARD, values, (s.item, "B"))
    if s.world_size == 1:
        # a single rank neither gathers parameters nor reduces gradients
        return
    yield _part("reduce bucket", "gpu", ALWAYS, (engine.reduce_bucket_bytes, "B"))
    copies = (engine.live_blocks if s.on_gpu else 1, "blocks")
    yield _part("gathered blocks", "gpu", (TEACHER, BACKWARD), copies, values, (s.item, "B"))
    # The bucket is reduced when the next gradient does not fit; a gradient larger than the bucket is reduced alone.
    # Reduce-scatter copies the bucket to interleave it, and its result is converted to fp32.
    full = min(max(engine.reduce_bucket_bytes // s.item, s.largest_whole), s.numel)
    yield _part("reduce-scatter", "gpu", BACKWARD, (full, "values"), (s.item, "B"))
    own = (full / s.world_size, "values")
    yield _part("reduced gradients in fp32", "gpu", BACKWARD, own, (4 if s.item == 2 else 0, "B"))


def _branches(s: _Sizes) -> tuple[float, float, float]:
    """Return the values per token that autograd saves in a block: of attention, of the MLP, of the residual stream.

    The first two are per token that drop-path keeps, the last is per token.
    """
    model = s.config.model
    dropped = model.drop_path > 0
    # kept rows (if drop-path selects some), norm, q k v, rotated q k, output, its packed copy, projection
    attention = model.dim * (dropped + 1 + 3 + 2 + 1 + 1 + 1)
    hidden = 4 * model.hidden if model.mlp == "swiglu" else 2 * model.hidden
    mlp = model.dim * (dropped + 1 + 1) + hidden
    return attention, mlp, 2 * model.dim


def _tiled_blocks(s: _Sizes) -> Iterator[Part]:
    model, engine = s.config.model, s.config.engine
    tokens, item = (s.tokens, "tokens"), (s.item, "B")
    branches, width, values = (2 * model.depth - 1, "branches"), (model.dim, "values"), (s.block, "values")
    # only inputs of branches are saved; the backward recomputes everything else
    yield _part("kept between branches", "gpu", (LOSS, BACKWARD), branches, tokens, width, item)
    read = sum(s.images) + (s.images[0] * s.global_tokens if s.config.objective.gram.is_active else s.masked_rows)
    yield _part("the last branch's rows", "gpu", (LOSS, BACKWARD), (read, "rows"), width, item)
    yield _part("gradients of the stream", "gpu", BACKWARD, (2, "copies"), tokens, width, item)
    yield _part("a block's values laid out", "gpu", ALWAYS, (2, "directions"), values, item)
    # by default the number of threads depends on the machine
    threads = (engine.cpu_threads or 1, "threads")
    yield _part("a block's gradient in fp32", "gpu", ALWAYS, threads, values, (4, "B"))


def _blocks(s: _Sizes) -> Iterator[Part]:
    model, engine = s.config.model, s.config.engine
    attention, mlp, stream = _branches(s)
    item = (s.item, "B")
    kept, tokens = (s.kept_tokens, "kept tokens"), (s.tokens, "tokens")
    depth = (model.depth, "blocks")
    through = (LOSS, BACKWARD)
    groups = engine.view_groups
    if engine.checkpointing == "block":
        location: Location = "host" if engine.offload_checkpoints and s.on_gpu else "gpu"
        yield _part("kept between blocks", location, through, depth, tokens, (model.dim, "values"), item)
        inside = (attention + mlp) if groups == 1 else max(attention, mlp) / groups + 4 * model.dim
        yield _part("recomputed block", "gpu", BACKWARD, kept, (inside, "values"), item)
        yield _part("recomputed stream", "gpu", BACKWARD, tokens, (stream, "values"), item)
    else:
        # a recomputed MLP saves its input and its output
        name, saved = "kept branches", attention + mlp
        if engine.checkpointing == "selective":
            name, saved = "kept attention branches", attention + (2 if model.drop_path else 1) * model.dim
        yield _part(name, "gpu", through, depth, kept, (saved, "values"), item)
        yield _part("kept stream", "gpu", through, depth, tokens, (stream, "values"), item)
    if engine.checkpointing == "selective":
        yield _part("recomputed MLP", "gpu", BACKWARD, kept, (mlp / groups, "values"), item)
    # gradients of the MLP's widest activations, and of the stream
    wide = (3 if model.mlp == "swiglu" else 2) * model.hidden / (groups if engine.checkpointing != "none" else 1)
    yield _part("gradients of activations", "gpu", BACKWARD, kept, (wide + 2 * model.dim, "values"), item)
    if engine.fp8:
        # the widest operand of an FP8 matmul; without a compiled kernel also its fp32 copy
        widest = ((2 if model.mlp == "swiglu" else 1) * model.hidden, "values")
        size = (1 if engine.compiles(on_gpu=s.on_gpu) else 5, "B")
        yield _part("a factor in 8 bits", "gpu", through, kept, widest, size)
    peak = max(8 * model.dim, 2 * model.dim + (4 if model.mlp == "swiglu" else 2) * model.hidden)
    chunk = (min(s.config.teacher.chunk or s.images[0], s.images[0]) * s.global_tokens, "tokens of a chunk")
    yield _part("teacher's block", "gpu", TEACHER, chunk, (peak, "values"), item)


def _activations(s: _Sizes) -> Iterator[Part]:
    config, model, through, item = s.config, s.config.model, (LOSS, BACKWARD), (s.item, "B")
    yield from (_tiled_blocks if s.implementation == CPU_KERNELS else _blocks)(s)
    patches = s.images[0] * (s.global_tokens - 1) + s.images[1] * (s.local_tokens - 1)
    yield _part("embedded pixels", "gpu", through, (patches, "patches"), (3 * 3 * model.patch_size**2, "values"), item)
    for name, head, rows, _ in s.heads:
        per_row = 2 * model.dim + 2 * head.hidden * (head.layers - 1) + 6 * head.bottleneck
        yield _part(f"{name} head", "gpu", through, (rows, "rows"), (per_row, "values"), item)

    # the teacher needs the residual stream, and one block's activations for one chunk of images
    stream_tokens = (s.images[0] * s.global_tokens, "tokens")
    width = 2 * model.dim if config.teacher.chunk else 3 * model.dim
    yield _part("teacher's stream", "gpu", TEACHER, stream_tokens, (width, "values"), item)

    crops = config.crops
    pixels = crops.global_count * crops.global_size**2 + crops.local_count * crops.local_size**2
    batches, samples = (s.accumulation + 2, "micro-batches"), (config.data.micro_batch, "samples")
    if config.objective.gram.is_active and config.objective.gram.size:
        pixels += crops.global_count * config.objective.gram.size**2
    yield _part("crops of the step", "gpu", ALWAYS, batches, samples, (3 * pixels, "B"))
    if config.objective.gram.is_active:
        similarities = (s.images[0] * (s.global_tokens - 1) ** 2, "patch pairs")
        yield _part("Gram matrices and their gradient", "gpu", through, similarities, (4, "copies"), (4, "B"))
    for name, head, _, rows in s.heads:
        # Sinkhorn needs the rows of all micro-batches
        kept_rows = (s.accumulation * rows, "rows")
        yield _part(f"{name} teacher features", "gpu", ALWAYS, kept_rows, (head.bottleneck, "values"), item)
        yield _part(f"{name} features joined", "gpu", TARGETS, kept_rows, (head.bottleneck, "values"), item)
    if config.objective.patch_loss.kind != "ibot":
        masked = (s.accumulation * s.masked_rows, "rows")
        yield _part("patch teacher features", "gpu", ALWAYS, masked, (model.dim, "values"), item)


def _prototypes(s: _Sizes) -> Iterator[Part]:
    # a chunk has at least 64 prototypes, which with many rows may exceed chunk_bytes
    chunk = max(s.config.objective.chunk_bytes, *(64 * 4 * s.accumulation * rows for _, _, _, rows in s.heads))
    largest = max(head.prototypes * head.bottleneck for _, head, _, _ in s.heads)
    # a single rank uses its shard
    gathered = (largest if s.world_size > 1 else 0, "values")
    yield _part("teacher's prototypes gathered", "gpu", (TARGETS, LOSS), gathered, (s.item, "B"))
    yield _part("student's prototypes gathered", "gpu", LOSS, gathered, (s.item, "B"))
    for name, head, _, _ in s.heads:
        values = (head.prototypes * head.bottleneck, "values")
        yield _part(f"{name} prototypes' gradient", "gpu", (LOSS, BACKWARD), values, (s.item, "B"))
        yield _part(f"{name} column scalings", "gpu", ALWAYS, (head.prototypes, "prototypes"), (4, "B"))
    # in the loss: a chunk of logits shared by student and teacher, the student rows' targets, and their product
    yield _part("prototype chunk", "gpu", (TARGETS, LOSS), (chunk, "B"), (3, "copies"))


def _step(s: _Sizes) -> Iterator[Part]:
    engine = s.config.engine
    if engine.moments == "8bit":
        staged = (min(EIGHT_BIT_STAGED, max(s.flats)), "values")
        yield _part("8-bit staging", "gpu", OPTIMISER, staged, (EIGHT_BIT_SEARCH_BYTES, "B"))
    elif engine.moments == "disk" or (engine.moments == "host" and s.on_gpu):
        yield _part("moments' staging", "gpu", OPTIMISER, (min(STAGED, max(s.flats)), "values"), (8, "B"))
    if s.on_gpu and s.config.teacher.average == "host":
        yield _part("averages' staging", "gpu", AVERAGE, (min(STAGED, max(s.flats)), "values"), (4, "B"))
    if s.on_gpu:
        device = sum(p.num_bytes for p in _states(s) if p.location == "gpu")
        yield _part("context (allowance)", "gpu", ALWAYS, (CONTEXT_BYTES, "B"))
        yield _part("fragmentation (allowance)", "gpu", ALWAYS, (device, "B"), (FRAGMENTATION, ""))


def _host(s: _Sizes) -> Iterator[Part]:
    data, crops = s.config.data, s.config.crops
    yield _part("process (allowance)", "host", ALWAYS, (PROCESS_BYTES, "B"))
    yield _part("read ahead", "host", ALWAYS, (data.read_ahead_bytes, "B"))
    pixels = crops.global_count * crops.global_size**2 + crops.local_count * crops.local_size**2
    batch = (data.micro_batch, "samples")
    # decoded images of half a megapixel, and crops, queued in DALI and in transfer
    sample = (3 * pixels + 3 * 500_000, "B")
    yield _part("DALI and pinned crops", "host", ALWAYS, (data.prefetch + 2, "batches"), batch, sample)
    if s.on_gpu:
        yield _part("DALI's buffers", "gpu", ALWAYS, (data.prefetch + 1, "batches"), batch, sample)
    # checkpoints are read and written one fragment at a time; initial values are drawn for a full parameter
    yield _part("one parameter in fp32", "host", ALWAYS, (s.largest_whole, "values"), (4, "B"))


def _disk(s: _Sizes) -> Iterator[Part]:
    run = s.config.run
    if not run.checkpoint_every:
        # only the last step's
        kept = 1
    else:
        kept = min((run.keep_last or run.steps), max(1, run.steps // run.checkpoint_every)) + 1
        kept += run.steps // run.keep_every if run.keep_every else 0
    kept += s.config.evaluation.best is not None
    values = (s.shard * s.world_size, "values")
    yield _part("checkpoints", "disk", ALWAYS, (kept, "checkpoints"), values, (16, "B"))
    snapshots = run.steps // run.snapshot_every if run.snapshot_every else 0
    yield _part("snapshots", "disk", ALWAYS, (snapshots, "snapshots"), values, (4, "B"))


def _all_gather_bytes(s: _Sizes) -> int:
    """Return the bytes one rank receives: the student for forward and backward, and the teacher once."""
    heads = sum(head.prototypes * head.bottleneck for _, head, _, _ in s.heads)
    # the targets need the teacher's prototypes once more, once a step
    values = s.accumulation * 3 * s.numel + heads
    return round(values * s.item * (s.world_size - 1) / s.world_size)


def _transfer_bytes(s: _Sizes) -> int:
    """Return the bytes one rank moves to and from the host or disk: moments, EMA and offloaded activations."""
    moments = sum(p.num_bytes for p in _states(s) if p.name == "moments" and p.location != "gpu")
    if s.config.engine.moments == "disk":
        moments //= s.world_size
    ema = sum(p.num_bytes for p in _states(s) if p.name == "averages" and p.location == "host")
    offloaded = sum(p.num_bytes for p in _activations(s) if p.location == "host")
    return 2 * (moments + ema + s.accumulation * offloaded)
