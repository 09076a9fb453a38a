"""The time of an optimiser step on GPUs, predicted by operation, without torch or a device.

FLOPs are those of ``flops.py``. Kernels and bytes of all other operations come from ``operations.json``, which
``python tools/bench.py operations --write`` counts in the real code. Nothing here has been measured on our own step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from streamtrain.config.crops import CropSizes
from streamtrain.config.model import HeadConfig, ModelConfig
from streamtrain.config.tree import Config
from streamtrain.ops.chunks import chunk_rows
from streamtrain.planning.communication import collective_seconds, num_trained, num_values, target_seconds
from streamtrain.planning.flops import (
    Crops,
    Level,
    block_flops,
    embedding_flops,
    gram_flops,
    head_weights,
    micro_batch_crops,
    projector_weights,
    step_flops,
    trained_share,
    used_share,
    used_tokens,
)
from streamtrain.planning.hardware import (
    ACCUMULATE_BYTES,
    ATTENTION_SHARE,
    BUCKET_BYTES,
    COMPILED_SECONDS,
    DISK_RATE,
    EIGHT_BIT_BYTES,
    EMA_BYTES,
    GATHER_BYTES,
    GPUS_PER_HOST,
    HOOK_SECONDS,
    HOST_RATE,
    KERNEL_SECONDS,
    KEY_TILE,
    LAUNCH_SECONDS,
    OTHER_KERNELS,
    OTHER_MODULES,
    QUERY_TILE,
    UPDATE_BYTES,
    UPDATE_KERNELS,
    Hardware,
)
from streamtrain.planning.memory import Transfers
from streamtrain.planning.operation_counts import evaluate_counts
from streamtrain.planning.parts import BACKWARD, FORWARD, OPTIMISER, TARGETS, TEACHER

# of a projected token's value in the loss, in each pass; and the kernels of projector and loss (assumptions)
PROJECTED_BYTES, PROJECTOR_KERNELS = 24.0, 20.0
# causes of a step's time
ALL_REDUCES = "targets' all-reduces"
PARTS = ("matmul", "attention", "memory", "launch", "network", ALL_REDUCES, "transfer", "loader")


@dataclass(frozen=True)
class Region:
    """A part of a phase: seconds of one rank in an optimiser step."""

    name: str
    phase: str
    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    kernels: float = 0.0
    # host seconds in addition to the launches
    host: float = 0.0

    @property
    def device_seconds(self) -> float:
        return self.matmul + self.attention + self.memory + self.kernels * KERNEL_SECONDS

    @property
    def host_seconds(self) -> float:
        return self.kernels * LAUNCH_SECONDS + self.host

    @property
    def seconds(self) -> float:
        """The slower of the device and of the host that launches its kernels."""
        return max(self.device_seconds, self.host_seconds)

    def parts(self) -> dict[str, float]:
        """Return the seconds by cause."""
        launch = self.seconds - self.matmul - self.attention - self.memory
        return {"matmul": self.matmul, "attention": self.attention, "memory": self.memory, "launch": launch}

    def __mul__(self, factor: float) -> Region:
        names = ("matmul", "attention", "memory", "kernels", "host")
        return replace(self, **{name: factor * getattr(self, name) for name in names})


@dataclass(frozen=True)
class StepTime:
    """The predicted time of one optimiser step."""

    regions: tuple[Region, ...]
    # seconds of collectives by phase; computation of the same phase hides them
    communication: dict[str, float]
    # seconds of the targets' all-reduces, which computation waits for
    all_reduces: float
    # seconds that the update waits for copies of moments and EMA to and from the host or disk
    transfer: float
    # seconds of copies of offloaded activations by phase; computation of the same phase hides them
    offloading: dict[str, float]
    # seconds that the loader takes for the images of a step; the whole step hides them
    loader: float
    is_overlapped: bool = True
    parts: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        parts = dict.fromkeys(PARTS, 0.0)
        for region in self.regions:
            for name, seconds in region.parts().items():
                parts[name] += seconds
        parts |= {"network": self.exposed, ALL_REDUCES: self.all_reduces}
        parts["transfer"] = self.transfer + self._beyond_computation(self.offloading)
        parts["loader"] = max(0.0, self.loader - sum(parts.values()))
        object.__setattr__(self, "parts", parts)

    @property
    def exposed(self) -> float:
        """Seconds of gathers and reductions that computation does not hide."""
        if not self.is_overlapped:
            return sum(self.communication.values())
        return self._beyond_computation(self.communication)

    def _beyond_computation(self, seconds: dict[str, float]) -> float:
        """Return the part of ``seconds`` by phase that computation of the same phase does not hide."""
        busy = {phase: sum(r.seconds for r in self.regions if r.phase == phase) for phase in seconds}
        return sum(max(0.0, each - busy[phase]) for phase, each in seconds.items())

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """The cause that limits the step: the loader if the step waits for it, otherwise the largest part."""
        return "loader" if self.parts["loader"] else max(self.parts, key=self.parts.__getitem__)


NO_TRANSFERS = Transfers()


def predict(config: Config, world_size: int, hardware: Hardware, transfers: Transfers = NO_TRANSFERS) -> StepTime:
    """Predict an optimiser step of ``world_size`` GPUs, averaged over alternating crop sizes.

    Raises:
        ConfigError: if micro-batch x ranks does not divide the global batch.
    """
    _, accumulation = config.batch_split(world_size)
    shares = [entry.share for entry in config.crops.sizes] or [1.0]
    regions: list[Region] = []
    for share, sizes in zip(shares, config.crop_sizes, strict=True):
        model = _Model(config, sizes, hardware, accumulation)
        micro_batch = (*model.teacher(), *model.student(), *model.gather_and_gradient_copies(world_size))
        step = (*(each * accumulation for each in micro_batch), *model.targets())
        regions += [each * (share / sum(shares)) for each in step]
    regions += _update(config, world_size, hardware)
    # loads and stores run at the same time between GPU and host, but share a disk
    moments = transfers.moments / (DISK_RATE if config.engine.moments == "disk" else 2 * HOST_RATE)
    activations = transfers.activations / (2 * HOST_RATE)
    images = accumulation * config.data.micro_batch * min(world_size, GPUS_PER_HOST)
    return StepTime(
        tuple(regions),
        collective_seconds(config, world_size, hardware, accumulation),
        target_seconds(config, world_size, accumulation),
        moments + transfers.ema / (2 * HOST_RATE),
        {FORWARD: activations, BACKWARD: activations},
        images / hardware.loader,
        # with a single live block the next one is gathered after it
        is_overlapped=config.engine.live_blocks > 1,
    )


def mfu(config: Config, world_size: int, hardware: Hardware, seconds: float) -> float:
    """Return the model FLOPs utilisation of a step of ``seconds``."""
    peak = hardware.gpu.bf16 if hardware.bf16 else hardware.gpu.fp32
    return step_flops(config, world_size).model / world_size / seconds / peak


def smallest_hiding_micro_batch(config: Config, world_size: int, hardware: Hardware, largest: int = 1024) -> int | None:
    """Return the smallest micro-batch, a power of two, that hides the network; None if none up to ``largest`` does."""
    size = 1
    while size <= largest:
        data = config.data.model_copy(update={"micro_batch": size, "global_batch": None})
        if not predict(config.model_copy(update={"data": data}), world_size, hardware).exposed:
            return size
        size *= 2
    return None


class _Model:
    """The regions of a micro-batch with crops of given sizes."""

    def __init__(self, config: Config, sizes: CropSizes, hardware: Hardware, accumulation: int) -> None:
        self.config, self.hardware, self.accumulation = config, hardware, accumulation
        self.sizes = sizes
        self.full, self.local, self.masked = micro_batch_crops(config, sizes)
        self.fp8 = config.engine.fp8
        self.is_compiled = config.engine.compiles(on_gpu=True)
        self.mode = f"{'compiled' if self.is_compiled else 'eager'}/{'fp8' if self.fp8 else 'bf16'}"
        # bytes in the table are those of bf16
        self.width = 1.0 if hardware.bf16 else 2.0
        objective = config.objective
        self.heads: list[tuple[str, HeadConfig, int, int]] = []
        if config.teacher.model is not None:
            return
        # name, configuration, student rows and teacher rows of each head
        self.heads = [("global", objective.global_loss.head, self.full.images + self.local.images, self.full.images)]
        if objective.patch_loss.kind == "ibot":
            self.heads.append(("patch", objective.patch_loss.head, self.masked, self.masked))

    def teacher(self) -> Iterator[Region]:
        """Yield the regions of the teacher pass, and of the Gram teacher and the anchor if there are any."""
        if (backbone := self.config.teacher.backbone) is None:
            yield from self._teacher_blocks(self.full, self.full.images + self.masked)
        else:
            other = _Model(
                self.config.model_copy(update={"model": backbone}), self.sizes, self.hardware, self.accumulation
            )
            yield from other._teacher_blocks(other.full, other.full.images * other.full.tokens(backbone))
        for name, head, _, rows in self.heads:
            yield self._head(TEACHER, f"{name} head", "teacher/forward", head, rows, 1.0)
        if self.config.objective.gram.is_active:
            size = self.sizes.gram_size or self.sizes.global_size
            gram = Crops.of(self.config.model, self.full.images, size, 0.0)
            yield from self._teacher_blocks(gram, gram.images * gram.tokens(self.config.model))
        if self.config.objective.anchor.is_active:
            anchor = Crops.of(self.config.model, self.full.images, self.sizes.global_size, 0.0)
            yield from self._teacher_blocks(anchor, anchor.images * anchor.tokens(self.config.model))

    def _teacher_blocks(self, crops: Crops, used: int) -> Iterator[Region]:
        chunks = math.ceil(crops.images / self.config.teacher.chunk) if self.config.teacher.chunk else 1
        yield self._embedding(TEACHER, "teacher/forward", [crops], 1.0)
        last = used_share(self.config.model, crops, used)
        yield from self._block(TEACHER, "teacher/forward", [(crops, crops.images)], last, chunks)

    def student(self) -> Iterator[Region]:
        """Yield the regions of the student's forward and backward, with recomputation."""
        engine, model = self.config.engine, self.config.model
        where = "student_drop" if model.drop_path else "student"
        crops = [(each, each.kept) for each in (self.full, self.local) if each.images]
        tokens = sum(each.images * each.tokens(model) for each, _ in crops)
        used = used_tokens(self.config, self.full, self.masked) + self.local.images
        last = used / tokens
        calls = engine.view_groups if engine.checkpointing != "none" else 1
        yield self._embedding(FORWARD, "student/forward", [each for each, _ in crops], 1.0)
        yield from self._block(FORWARD, f"{where}/forward", crops, last, calls)
        yield from self._block(BACKWARD, f"{where}/backward", crops, last, calls, is_backward=True)
        for region in self._block(BACKWARD, f"{where}/forward", crops, last, calls):
            yield from self._recomputed(region)
        yield self._embedding(BACKWARD, "student/backward", [each for each, _ in crops], 1.0)
        for name, head, rows, teacher_rows in self.heads:
            yield self._head(FORWARD, f"{name} head", "student/forward", head, rows, 1.0)
            yield self._head(BACKWARD, f"{name} head", "student/backward", head, rows, 2.0)
            yield from self._loss(name, head, rows, teacher_rows)
        objective = self.config.objective
        if objective.gram.is_active:
            yield from self._gram_loss(objective.gram.level, objective.gram.negatives)
        if objective.anchor.is_active and objective.anchor.patches == "gram":
            yield from self._gram_loss("image", "keep")
        if (backbone := self.config.teacher.backbone) is not None:
            rows = self.full.images + self.local.images + self.masked
            yield self._projector(FORWARD, rows, backbone, 1.0)
            yield self._projector(BACKWARD, rows, backbone, 2.0)

    def _recomputed(self, region: Region) -> Iterator[Region]:
        """Yield a branch's recomputation: of the whole block, and of the single branch in groups of images."""
        model, engine = self.config.model, self.config.engine
        whole = engine.checkpointing == "block"
        if whole:
            yield replace(region, name=f"{region.name}, recomputed")
        if (engine.checkpointing == "selective" and region.name == "mlp") or (whole and engine.view_groups > 1):
            # stops before the last matmul, whose output was saved
            share = 0.75 if region.name == "attention" else (2 / 3 if model.mlp == "swiglu" else 0.5)
            yield replace(region, name=f"{region.name}, recomputed in groups", matmul=share * region.matmul)

    def _block(
        self, phase: str, key: str, crops: list[tuple[Crops, int]], last: float, calls: int, is_backward: bool = False
    ) -> Iterator[Region]:
        """Yield both branches of all blocks; ``last`` is the share of the tokens that the last MLP computes.

        Args:
            crops: crops of each size, and the number of them that a branch computes.
            calls: groups of images, one after another.
        """
        model, hardware = self.config.model, self.hardware
        tokens = sum(each.images * each.tokens(model) for each, _ in crops)
        kept = sum(images * each.tokens(model) for each, images in crops)
        linear = padded = mlp = 0.0
        for each, images in crops:
            own, scores, own_mlp = block_flops(model, each, images)
            linear, mlp = linear + own, mlp + own_mlp
            padded += scores * padding_factor(each.tokens(model), QUERY_TILE, KEY_TILE)
        # the backward forms five matmuls of scores where the forward forms two
        attention = padded * (2.5 if is_backward else 1.0) / (ATTENTION_SHARE * hardware.gpu.bf16)
        if not hardware.bf16:
            attention *= hardware.gpu.bf16 / hardware.gpu.fp32
        wide, depth = model.hidden * (3 if model.mlp == "swiglu" else 2), model.depth
        values = {"attention": 6 * model.dim, "mlp": 2 * model.dim + wide}
        inner = {"attention": float(model.dim), "mlp": 2 * model.dim * model.hidden / (model.dim + model.hidden)}
        # ZeRO-3's hooks run between the launches of a block's branches
        host = (COMPILED_SECONDS * calls if self.is_compiled else 0.0) + HOOK_SECONDS / 2
        for name, flops, count in (("attention", linear, float(depth)), ("mlp", mlp, depth - 1 + last)):
            table = f"{'attention' if name == 'attention' else f'mlp_{model.mlp}'}/{key}/{self.mode}"
            kernels, num_bytes = evaluate_counts(table, tokens=tokens, kept=kept, dim=model.dim, hidden=model.hidden)
            moved = 2.0 * self.width * kept * values[name]
            seconds = hardware.matmul_seconds(flops, inner[name], moved, "fp8" if self.fp8 else "default")
            if is_backward:
                # the gradients of the trained weights are bf16 matmuls over all tokens
                seconds += hardware.matmul_seconds(flops, kept, moved) * trained_share(model, name)
            yield Region(
                name, phase, count * seconds, depth * attention if name == "attention" else 0.0,
                count * hardware.memory_seconds(self.width * num_bytes), depth * calls * kernels, depth * host,
            )  # fmt: skip

    def _embedding(self, phase: str, key: str, crops: list[Crops], passes: float) -> Region:
        model, hardware = self.config.model, self.hardware
        tokens = sum(each.images * each.tokens(model) for each in crops)
        pixels = sum(each.images * each.patches * model.channels * model.patch_size**2 for each in crops)
        kernels, num_bytes = evaluate_counts(f"embedding/{key}", tokens=tokens, dim=model.dim, pixels=pixels)
        flops = passes * sum(embedding_flops(model, each) for each in crops)
        matmul = hardware.matmul_seconds(
            flops, model.channels * model.patch_size**2, 2.0 * (pixels + tokens * model.dim)
        )
        return Region("embedding", phase, matmul, memory=hardware.memory_seconds(num_bytes), kernels=kernels)

    def _head(self, phase: str, name: str, key: str, head: HeadConfig, rows: int, passes: float) -> Region:
        dim, hardware = self.config.model.dim, self.hardware
        kernels, num_bytes = evaluate_counts(
            f"head/{key}", rows=rows, dim=dim, hidden=head.hidden, bottleneck=head.bottleneck, layers=head.layers,
            inner=head.layers - 1,
        )  # fmt: skip
        weights = head_weights(self.config.model, head)
        matmul = passes * hardware.matmul_seconds(2.0 * rows * weights, head.hidden, 2.0 * weights)
        return Region(name, phase, matmul, memory=hardware.memory_seconds(num_bytes), kernels=kernels)

    def _projector(self, phase: str, rows: int, teacher: ModelConfig, passes: float) -> Region:
        """Return the projector to a feature teacher's width, with the loss; the bytes are assumed, not counted."""
        weights = projector_weights(self.config, teacher)
        inner = min(self.config.model.dim, teacher.dim)
        matmul = passes * self.hardware.matmul_seconds(2.0 * rows * weights, inner, 2.0 * weights)
        moved = rows * teacher.dim * PROJECTED_BYTES
        return Region("projector", phase, matmul, memory=self.hardware.memory_seconds(moved), kernels=PROJECTOR_KERNELS)

    def _loss(self, name: str, head: HeadConfig, rows: int, teacher_rows: int) -> Iterator[Region]:
        hardware, objective = self.hardware, self.config.objective
        chunk = chunk_rows(objective.chunk_size(on_gpu=True), rows + teacher_rows, head.prototypes)
        sizes = {
            "rows": rows, "teacher_rows": teacher_rows, "prototypes": head.prototypes, "bottleneck": head.bottleneck,
            "chunks": math.ceil(head.prototypes / chunk),
        }  # fmt: skip
        logits, teacher_logits = rows * head.prototypes, teacher_rows * head.prototypes
        # the student's logits twice and the teacher's once, stored in fp32; two gradients, read in bf16
        matmul = hardware.matmul_seconds(2.0 * logits * head.bottleneck, head.bottleneck, 4.0 * logits) * 2
        matmul += hardware.matmul_seconds(2.0 * teacher_logits * head.bottleneck, head.bottleneck, 4.0 * teacher_logits)
        matmul += hardware.matmul_seconds(2.0 * logits * head.bottleneck, chunk, 2.0 * logits) * 2
        for phase, key in ((FORWARD, "forward"), (BACKWARD, "backward")):
            kernels, num_bytes = evaluate_counts(f"loss_{name}/{key}", **sizes)
            memory = hardware.memory_seconds(num_bytes)
            yield Region(f"{name} loss", phase, matmul if phase == FORWARD else 0.0, memory=memory, kernels=kernels)

    def _gram_loss(self, level: Level, negatives: str) -> Iterator[Region]:
        """Yield the loss on patch similarities in fp32; its gradient is computed in the forward."""
        hardware, objective, crops = self.hardware, self.config.objective, self.full
        dim, patches = self.config.model.dim, crops.images * crops.patches
        groups = crops.images if level == "image" else 1
        rows, values = patches // groups, patches * dim
        pairs = groups * rows**2
        flops, moved = gram_flops(self.config, crops, level) / 3, 4.0 * (pairs + 2 * values)
        matmul = 2 * hardware.matmul_seconds(flops, dim, moved, "fp32")
        matmul += hardware.matmul_seconds(flops, rows, moved, "fp32")
        # whole groups, or rows of one
        at_once = objective.chunk_size(on_gpu=True) // (4 * rows)
        chunks = math.ceil(groups / (at_once // rows)) if at_once > rows else groups * math.ceil(rows / max(1, at_once))
        for phase, key in ((FORWARD, "forward"), (BACKWARD, "backward")):
            kernels, num_bytes = evaluate_counts(f"gram_{negatives}/{key}", values=values, pairs=pairs, chunks=chunks)
            memory = hardware.memory_seconds(num_bytes)
            yield Region("gram loss", phase, matmul if phase == FORWARD else 0.0, memory=memory, kernels=kernels)

    def targets(self) -> Iterator[Region]:
        """Yield the targets of the step, over the rows of all its micro-batches."""
        hardware, objective = self.hardware, self.config.objective
        for name, head, _, teacher_rows in self.heads:
            rows = self.accumulation * teacher_rows
            chunks = math.ceil(head.prototypes / chunk_rows(objective.chunk_size(on_gpu=True), rows, head.prototypes))
            times = objective.sinkhorn_iterations if objective.centering == "sinkhorn" else 1
            kernels, num_bytes = evaluate_counts(
                f"targets_{objective.centering}", rows=rows, prototypes=head.prototypes, bottleneck=head.bottleneck,
                chunks=chunks, later=times - 1,
            )  # fmt: skip
            logits = rows * head.prototypes
            matmul = times * hardware.matmul_seconds(2.0 * logits * head.bottleneck, head.bottleneck, 4.0 * logits)
            yield Region(f"{name} targets", TARGETS, matmul, memory=hardware.memory_seconds(num_bytes), kernels=kernels)

    def gather_and_gradient_copies(self, world_size: int) -> Iterator[Region]:
        """Yield ZeRO-3's copies of gathered parameters and gradients, its hooks, and kernels outside the regions."""
        numel = num_values(self.config)
        width = self.width
        copies = self.hardware.memory_seconds(width * GATHER_BYTES * numel) if world_size > 1 else 0.0
        for phase in (TEACHER, FORWARD, BACKWARD):
            host = OTHER_MODULES * HOOK_SECONDS
            yield Region("gathers and others", phase, memory=copies, kernels=OTHER_KERNELS[phase], host=host)
        trained = num_trained(self.config)
        moved = ACCUMULATE_BYTES * trained / world_size + (width * BUCKET_BYTES * trained if world_size > 1 else 0.0)
        yield Region("gradients", BACKWARD, memory=self.hardware.memory_seconds(moved))


def padding_factor(tokens: int, *tiles: int) -> float:
    """Return the work of attention in whole tiles, relative to the exact one."""
    return math.prod(math.ceil(tokens / tile) * tile / tokens for tile in tiles)


def _update(config: Config, world_size: int, hardware: Hardware) -> Iterator[Region]:
    shard = num_trained(config) / world_size
    per_value = EIGHT_BIT_BYTES if config.engine.moments == "8bit" else UPDATE_BYTES
    kernels = UPDATE_KERNELS * 2 * (config.model.depth + 2)
    yield Region("AdamW", OPTIMISER, memory=hardware.memory_seconds(per_value * shard), kernels=kernels)
    yield Region("EMA", OPTIMISER, memory=hardware.memory_seconds(EMA_BYTES * shard), kernels=kernels / 4)
