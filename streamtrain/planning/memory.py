"""What a run will take, to the byte where that can be known, from the configuration alone: no torch, no device.

Model states are exact. Activations and temporaries are counted tensor by tensor from what autograd keeps; what
libraries take for themselves (contexts, communicators, decoders) is an allowance and is called so.
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

Place = Literal["gpu", "host", "disk"]
# a CUDA context with its kernels, cuBLAS' workspace, NCCL's buffers; fragmentation is on top of a fitting plan
CONTEXT_BYTES = 1_500_000_000
# an interpreter with torch, DeepSpeed and DALI, as measured by `tools/bench.py memory`
PROCESS_BYTES = 800_000_000
# of tensors freed on a CPU, at most, that stay with the process for the next ones (``streamtrain/ops/cpu/memory.cpp``)
KEPT_BYTES = 2**30
# of the allocator, in percent of what is allocated
FRAGMENTATION = 0.03
# ranks that share a host
RANKS_A_HOST = 8
# values a chunk of moments or averages that visit the device, and bytes a value while 8-bit codes are searched
STAGED, EIGHT_BIT_STAGED, EIGHT_BIT_SEARCH_BYTES = 16 * 2**20, 4 * 2**20, 56

ALWAYS = "always"
TEACHER, TARGETS, LOSS = "teacher pass", "targets", "prototype loss"
BACKWARD, OPTIMISER, AVERAGE = "backward", "optimiser step", "average update"
PHASES = (TEACHER, TARGETS, LOSS, BACKWARD, OPTIMISER, AVERAGE)


@dataclass(frozen=True)
class Part:
    """One buffer of a rank: where it is, how large, when it is there, and why so large."""

    name: str
    place: Place
    num_bytes: int
    when: tuple[str, ...]
    sum: str


@dataclass(frozen=True)
class Plan:
    """All buffers of one rank, and what a step costs."""

    parts: tuple[Part, ...]
    ranks_a_host: int
    # of all ranks together, with what is computed again
    flops_per_step: float
    # received by one rank
    all_gather_bytes_per_step: int
    # moved between the device and the host or the disk by one rank
    transfer_bytes_per_step: int
    num_parameters: int

    def at(self, phase: str, place: Place = "gpu") -> int:
        """Bytes of one rank in ``place`` during ``phase``."""
        return sum(p.num_bytes for p in self.parts if p.place == place and (ALWAYS in p.when or phase in p.when))

    @property
    def peak_phase(self) -> str:
        """When the device holds most."""
        return max(PHASES, key=self.at)

    @property
    def gpu_bytes(self) -> int:
        """The most that one device holds."""
        return self.at(self.peak_phase)

    @property
    def host_bytes(self) -> int:
        """The most that all ranks of one host hold in its memory."""
        return self.ranks_a_host * max(self.at(phase, "host") for phase in PHASES)

    @property
    def disk_bytes(self) -> int:
        """Of all ranks: the checkpoints that are kept, the one being written, and moments in files."""
        return self.at(ALWAYS, "disk")

    @property
    def state_bytes(self) -> int:
        """Of one rank: values, masters, gradients, moments and averages, wherever they are (checkpoints aside)."""
        return sum(part.num_bytes for part in self.parts if part.name in STATES)


STATES = ("student values", "masters", "gradients", "moments", "teacher values", "averages")


def plan(config: Config, world_size: int, *, on_gpu: bool = True, bf16: bool = True, kernels: bool = True) -> Plan:
    """The plan of each of ``world_size`` ranks.

    Args:
        on_gpu: whether the ranks compute on GPUs; else "gpu" stands for what a rank's network takes of the host.
        bf16: whether the network computes in 16 bits.
        kernels: whether CPUs have what kernels need, where they are asked for.

    Raises:
        ConfigError: if micro-batch x ranks does not divide the global batch.
    """
    sizes = _Sizes.of(config, world_size, on_gpu, bf16, kernels)
    parts = [*_states(sizes), *_gathers(sizes), *_activations(sizes), *_prototypes(sizes), *_step(sizes), *_host(sizes)]
    parts += _disk(sizes)
    return Plan(
        tuple(part for part in parts if part.num_bytes),
        min(world_size, RANKS_A_HOST),
        step_flops(config, world_size).executed,
        _all_gather_bytes(sizes),
        _transfer_bytes(sizes),
        sizes.numel,
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers that several parts need."""

    config: Config
    world_size: int
    on_gpu: bool
    # whether CPUs have what kernels need
    kernels: bool
    # bytes of a computed value
    item: int
    accumulation: int
    numel: int
    shard: int
    # of each flat tensor, and of the largest parameter
    flats: tuple[int, ...]
    largest_whole: int
    block: int
    # tokens of a global and of a local crop
    global_tokens: int
    local_tokens: int
    masked_rows: int

    @classmethod
    def of(cls, config: Config, world_size: int, on_gpu: bool, bf16: bool, kernels: bool) -> _Sizes:
        _, accumulation = config.batch_split(world_size)
        part = partition(parameter_shapes(config), config, world_size)
        prefix = 1 + config.model.num_registers
        sides = [size // config.model.patch_size for size in (config.crops.global_size, config.crops.local_size)]
        crops, batch = config.crops, config.data.micro_batch
        rows = max_rows(config.masks, batch, crops.global_count, sides[0] ** 2, math.gcd(batch, config.masks.group))
        return cls(
            config, world_size, on_gpu, kernels, 2 if bf16 else 4, accumulation, part.numel, part.shard_numel,
            part.flat_numels, part.largest_numel,
            sum(map(math.prod, block_shapes(config.model).values())),
            prefix + sides[0] ** 2, prefix + sides[1] ** 2, rows,
        )  # fmt: skip

    @property
    def largest_flat(self) -> int:
        """Values of the largest flat tensor."""
        return max(self.flats)

    @property
    def images(self) -> tuple[int, int]:
        """Global and local crops of a micro-batch."""
        batch = self.config.data.micro_batch
        return self.config.crops.global_count * batch, self.config.crops.local_count * batch

    @property
    def tokens(self) -> int:
        """Of the student's micro-batch."""
        return self.images[0] * self.global_tokens + self.images[1] * self.local_tokens

    @property
    def kept_tokens(self) -> int:
        """That drop-path lets through a branch."""
        kept = [max(1, round((1 - self.config.model.drop_path) * images)) if images else 0 for images in self.images]
        return kept[0] * self.global_tokens + kept[1] * self.local_tokens

    @property
    def by_kernels(self) -> bool:
        """Whether CPUs compute blocks by kernels (``streamtrain/model/fused.py``)."""
        model, engine = self.config.model, self.config.engine
        asked = engine.cpu_kernels and self.kernels and not engine.fp8 and not engine.compiles(on_gpu=False)
        fitting = all(width % 32 == 0 for width in (model.dim, model.hidden, model.dim // model.num_heads))
        return asked and fitting and not self.on_gpu

    @property
    def heads(self) -> list[tuple[str, HeadConfig, int, int]]:
        """Name, sizes, student rows and teacher rows (of one micro-batch) of each head."""
        objective = self.config.objective
        heads = [("global", objective.global_loss.head, sum(self.images), self.images[0])]
        if objective.patch_loss.kind == "ibot":
            heads.append(("patch", objective.patch_loss.head, self.masked_rows, self.masked_rows))
        return heads


def _part(name: str, place: Place, when: tuple[str, ...] | str, *factors: tuple[float, str]) -> Part:
    """A part whose size is a product; the factors are its explanation."""
    when = (when,) if isinstance(when, str) else when
    shown = " x ".join(f"{value:,.15g} {what}" for value, what in factors)
    return Part(name, place, round(math.prod(value for value, _ in factors)), when, shown)


def _states(s: _Sizes) -> Iterator[Part]:
    engine, shard = s.config.engine, (s.shard, "values of this rank")
    fp32 = s.item == 4
    yield _part("student values", "gpu", ALWAYS, shard, (s.item, "B"))
    # where the network computes in fp32 its values are the masters
    yield _part("masters", "gpu", ALWAYS, shard, (0 if fp32 else 4, "B"))
    yield _part("gradients", "gpu", ALWAYS, shard, (4, "B"))
    if engine.moments == "8bit":
        # padded to blocks of 256 values with a scale each, flat tensor by flat tensor
        blocks = sum(-(-numel // 256) for numel in s.flats)
        yield _part("moments", "gpu", ALWAYS, (blocks, "blocks"), (2 * 260, "B"))
    else:
        on_device: Place = "host" if s.on_gpu and engine.moments == "host" else "gpu"
        place: Place = "disk" if engine.moments == "disk" else on_device
        away = 0 if engine.moments == "device" else s.shard - _kept_moments(s)
        yield _part("moments", "gpu", ALWAYS, (s.shard - away, "values of this rank"), (8, "B"))
        ranks = s.world_size if place == "disk" else 1
        yield _part("moments", place, ALWAYS, (away, "values"), (8 * ranks, "B"))
    on_host = s.on_gpu and s.config.teacher.average == "host"
    yield _part("teacher values", "gpu", ALWAYS, shard, (0 if fp32 and not on_host else s.item, "B"))
    yield _part("averages", "host" if on_host else "gpu", ALWAYS, shard, (4, "B"))
    if s.config.objective.gram.is_active:
        backbone = {n: shape for n, shape in parameter_shapes(s.config).items() if n.startswith("backbone.")}
        own = partition(backbone, s.config, s.world_size).shard_numel
        yield _part("Gram teacher", "gpu", ALWAYS, (own, "values of this rank"), (s.item, "B"))


def _kept_moments(s: _Sizes) -> int:
    """Values of this rank whose moments stay on the device, with a ratio below 1."""
    return sum(int((1.0 - s.config.engine.moments_ratio) * numel) // 256 * 256 for numel in s.flats)


def _gathers(s: _Sizes) -> Iterator[Part]:
    engine, values = s.config.engine, (s.block, "values")
    yield _part("gradient of a block", "gpu", BACKWARD, values, (s.item, "B"))
    if s.world_size == 1:
        # one rank's shard is the whole parameter: it is used in place, and its gradient put away as it is
        return
    yield _part("reduce bucket", "gpu", ALWAYS, (engine.reduce_bucket_bytes, "B"))
    copies = (engine.live_blocks if s.on_gpu else 1, "blocks")
    yield _part("gathered blocks", "gpu", (TEACHER, BACKWARD), copies, values, (s.item, "B"))
    # The bucket is reduced when the next gradient finds no room in it, one that never does on its own. Reduce-scatter
    # interleaves it anew, and its result is turned into fp32.
    full = min(max(engine.reduce_bucket_bytes // s.item, s.largest_whole), s.numel)
    yield _part("reduce-scatter", "gpu", BACKWARD, (full, "values"), (s.item, "B"))
    own = (full / s.world_size, "values")
    yield _part("reduced gradients in fp32", "gpu", BACKWARD, own, (4 if s.item == 2 else 0, "B"))


def _branches(s: _Sizes) -> tuple[float, float, float]:
    """What autograd keeps of one block, in values a token of a branch: attention, MLP, and the stream a token."""
    model = s.config.model
    dropped = model.drop_path > 0
    # kept rows (where drop-path selects), norm, q k v, turned q k, output, its packed copy, projection
    attention = model.dim * (dropped + 1 + 3 + 2 + 1 + 1 + 1)
    hidden = 4 * model.hidden if model.mlp == "swiglu" else 2 * model.hidden
    mlp = model.dim * (dropped + 1 + 1) + hidden
    return attention, mlp, 2 * model.dim


def _blocks_by_kernels(s: _Sizes) -> Iterator[Part]:
    model, engine = s.config.model, s.config.engine
    tokens, item = (s.tokens, "tokens"), (s.item, "B")
    branches, width, values = (2 * model.depth - 1, "branches"), (model.dim, "values"), (s.block, "values")
    # all that a branch makes of its input passes through the cache, and is made again in the backward
    yield _part("kept between branches", "gpu", (LOSS, BACKWARD), branches, tokens, width, item)
    read = sum(s.images) + (s.images[0] * s.global_tokens if s.config.objective.gram.is_active else s.masked_rows)
    yield _part("the last branch's rows", "gpu", (LOSS, BACKWARD), (read, "rows"), width, item)
    yield _part("gradients of the stream", "gpu", BACKWARD, (2, "copies"), tokens, width, item)
    yield _part("a block's values laid out", "gpu", ALWAYS, (2, "directions"), values, item)
    # the number of threads follows from the machine where it is not set
    threads = (engine.cpu_threads or 1, "threads")
    yield _part("a block's gradient in fp32", "gpu", ALWAYS, threads, values, (4, "B"))


def _blocks(s: _Sizes) -> Iterator[Part]:
    model, engine = s.config.model, s.config.engine
    attention, mlp, stream = _branches(s)
    item = (s.item, "B")
    kept, tokens = (s.kept_tokens, "kept tokens"), (s.tokens, "tokens")
    depth = (model.depth, "blocks")
    through = (LOSS, BACKWARD)
    if engine.checkpointing == "block":
        place: Place = "host" if engine.offload_checkpoints and s.on_gpu else "gpu"
        yield _part("kept between blocks", place, through, depth, tokens, (model.dim, "values"), item)
    elif engine.checkpointing == "selective":
        # a recomputed branch keeps its input and its output
        of_mlp = (2 if model.drop_path else 1) * model.dim
        yield _part("kept attention branches", "gpu", through, depth, kept, (attention + of_mlp, "values"), item)
        yield _part("kept stream", "gpu", through, depth, tokens, (stream, "values"), item)
    else:
        yield _part("kept branches", "gpu", through, depth, kept, (attention + mlp, "values"), item)
        yield _part("kept stream", "gpu", through, depth, tokens, (stream, "values"), item)
    groups = engine.view_groups
    if engine.checkpointing == "block":
        inside = (attention + mlp) if groups == 1 else max(attention, mlp) / groups + 4 * model.dim
        yield _part("recomputed block", "gpu", BACKWARD, kept, (inside, "values"), item)
        yield _part("recomputed stream", "gpu", BACKWARD, tokens, (stream, "values"), item)
    elif engine.checkpointing == "selective":
        yield _part("recomputed MLP", "gpu", BACKWARD, kept, (mlp / groups, "values"), item)
    # gradients of the MLP's widest stretch, and of the stream
    wide = (3 if model.mlp == "swiglu" else 2) * model.hidden / (groups if engine.checkpointing != "none" else 1)
    yield _part("gradients of activations", "gpu", BACKWARD, kept, (wide + 2 * model.dim, "values"), item)
    if engine.fp8:
        # of what a product is given, the widest; on the way there in fp32 where that is not one kernel
        widest = ((2 if model.mlp == "swiglu" else 1) * model.hidden, "values")
        size = (1 if engine.compiles(on_gpu=s.on_gpu) else 5, "B")
        yield _part("a factor in 8 bits", "gpu", through, kept, widest, size)


def _activations(s: _Sizes) -> Iterator[Part]:
    config, model, through, item = s.config, s.config.model, (LOSS, BACKWARD), (s.item, "B")
    yield from _blocks_by_kernels(s) if s.by_kernels else _blocks(s)
    patches = s.images[0] * (s.global_tokens - 1) + s.images[1] * (s.local_tokens - 1)
    yield _part("embedded pixels", "gpu", through, (patches, "patches"), (3 * 3 * model.patch_size**2, "values"), item)
    for name, head, rows, _ in s.heads:
        per_row = 2 * model.dim + 2 * head.hidden * (head.layers - 1) + 6 * head.bottleneck
        yield _part(f"{name} head", "gpu", through, (rows, "rows"), (per_row, "values"), item)

    # the teacher keeps the stream, and the activations of one chunk of images within a block
    chunk = min(config.teacher.chunk or s.images[0], s.images[0])
    stream_tokens = (s.images[0] * s.global_tokens, "tokens")
    width = 2 * model.dim if config.teacher.chunk else 3 * model.dim
    yield _part("teacher's stream", "gpu", TEACHER, stream_tokens, (width, "values"), item)
    peak = max(8 * model.dim, 2 * model.dim + (4 if model.mlp == "swiglu" else 2) * model.hidden)
    of_chunk = (0 if s.by_kernels else chunk * s.global_tokens, "tokens of a chunk")
    yield _part("teacher's block", "gpu", TEACHER, of_chunk, (peak, "values"), item)

    crops = config.crops
    pixels = crops.global_count * crops.global_size**2 + crops.local_count * crops.local_size**2
    batch = config.data.micro_batch
    waiting = s.accumulation + 2
    if config.objective.gram.is_active and config.objective.gram.size:
        pixels += crops.global_count * config.objective.gram.size**2
    yield _part("crops of the step", "gpu", ALWAYS, (waiting, "micro-batches"), (batch, "samples"), (3 * pixels, "B"))
    if config.objective.gram.is_active:
        similarities = (s.images[0] * (s.global_tokens - 1) ** 2, "patch pairs")
        yield _part("Gram matrices and their gradient", "gpu", through, similarities, (4, "copies"), (4, "B"))
    for name, head, _, rows in s.heads:
        # Sinkhorn joins the rows of all micro-batches
        kept_rows = (s.accumulation * rows, "rows")
        yield _part(f"{name} teacher features", "gpu", ALWAYS, kept_rows, (head.bottleneck, "values"), item)
        yield _part(f"{name} features joined", "gpu", TARGETS, kept_rows, (head.bottleneck, "values"), item)
    if config.objective.patch_loss.kind != "ibot":
        masked = (s.accumulation * s.masked_rows, "rows")
        yield _part("patch teacher features", "gpu", ALWAYS, masked, (model.dim, "values"), item)


def _prototypes(s: _Sizes) -> Iterator[Part]:
    # never fewer than 64 prototypes: many rows may need more than was asked for
    chunk = max(s.config.objective.chunk_bytes, *(64 * 4 * s.accumulation * rows for _, _, _, rows in s.heads))
    largest = max(head.prototypes * head.bottleneck for _, head, _, _ in s.heads)
    # one rank's shard is the whole
    gathered = (largest if s.world_size > 1 else 0, "values")
    yield _part("teacher's prototypes gathered", "gpu", (TARGETS, LOSS), gathered, (s.item, "B"))
    yield _part("student's prototypes gathered", "gpu", LOSS, gathered, (s.item, "B"))
    for name, head, _, _ in s.heads:
        values = (head.prototypes * head.bottleneck, "values")
        yield _part(f"{name} prototypes' gradient", "gpu", (LOSS, BACKWARD), values, (s.item, "B"))
        yield _part(f"{name} column scalings", "gpu", ALWAYS, (head.prototypes, "prototypes"), (4, "B"))
    # students and teachers share a chunk in the loss; with it the targets gathered for the students, and products
    yield _part("prototype chunk", "gpu", (TARGETS, LOSS), (chunk, "B"), (3, "copies"))


def _step(s: _Sizes) -> Iterator[Part]:
    engine = s.config.engine
    if engine.moments == "8bit":
        staged = (min(EIGHT_BIT_STAGED, s.largest_flat), "values")
        yield _part("8-bit staging", "gpu", OPTIMISER, staged, (EIGHT_BIT_SEARCH_BYTES, "B"))
    elif engine.moments == "disk" or (engine.moments == "host" and s.on_gpu):
        yield _part("moments' staging", "gpu", OPTIMISER, (min(STAGED, s.largest_flat), "values"), (8, "B"))
    if s.on_gpu and s.config.teacher.average == "host":
        yield _part("averages' staging", "gpu", AVERAGE, (min(STAGED, s.largest_flat), "values"), (4, "B"))
    if s.on_gpu:
        device = sum(p.num_bytes for p in _states(s) if p.place == "gpu")
        yield _part("context (allowance)", "gpu", ALWAYS, (CONTEXT_BYTES, "B"))
        yield _part("fragmentation (allowance)", "gpu", ALWAYS, (device, "B"), (FRAGMENTATION, ""))


def _host(s: _Sizes) -> Iterator[Part]:
    data, crops = s.config.data, s.config.crops
    yield _part("process (allowance)", "host", ALWAYS, (PROCESS_BYTES, "B"))
    yield _part("read ahead", "host", ALWAYS, (data.read_ahead_bytes, "B"))
    pixels = crops.global_count * crops.global_size**2 + crops.local_count * crops.local_size**2
    batch = (data.micro_batch, "samples")
    # decoded images of half a megapixel and crops, in DALI's queue and on their way
    sample = (3 * pixels + 3 * 500_000, "B")
    yield _part("DALI and pinned crops", "host", ALWAYS, (data.prefetch + 2, "batches"), batch, sample)
    if s.on_gpu:
        yield _part("DALI's buffers", "gpu", ALWAYS, (data.prefetch + 1, "batches"), batch, sample)
    # a checkpoint is written one parameter's part after the other, and read so; the first values are drawn whole
    yield _part("one parameter in fp32", "host", ALWAYS, (s.largest_whole, "values"), (4, "B"))


def _disk(s: _Sizes) -> Iterator[Part]:
    run = s.config.run
    if not run.checkpoint_every:
        # the last step's
        kept = 1
    else:
        kept = min((run.keep_last or run.steps), max(1, run.steps // run.checkpoint_every)) + 1
        kept += run.steps // run.keep_every if run.keep_every else 0
    kept += s.config.evaluation.best is not None
    values = (s.shard * s.world_size, "values")
    yield _part("checkpoints", "disk", ALWAYS, (kept, "kept or being written"), values, (16, "B"))
    snapshots = run.steps // run.snapshot_every if run.snapshot_every else 0
    yield _part("snapshots", "disk", ALWAYS, (snapshots, "of the teacher"), values, (4, "B"))


def _all_gather_bytes(s: _Sizes) -> int:
    """The student is gathered for the forward and the backward, the teacher once; a rank's own part is at hand."""
    heads = sum(head.prototypes * head.bottleneck for _, head, _, _ in s.heads)
    # the teacher's prototypes also for the targets, once a step
    values = s.accumulation * 3 * s.numel + heads
    return round(values * s.item * (s.world_size - 1) / s.world_size)


def _transfer_bytes(s: _Sizes) -> int:
    moments = sum(p.num_bytes for p in _states(s) if p.name == "moments" and p.place != "gpu")
    if s.config.engine.moments == "disk":
        moments //= s.world_size
    averages = sum(p.num_bytes for p in _states(s) if p.name == "averages" and p.place == "host")
    offloaded = sum(p.num_bytes for p in _activations(s) if p.place == "host")
    return 2 * (moments + averages + s.accumulation * offloaded)
