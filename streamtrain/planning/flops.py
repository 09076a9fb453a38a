"""The arithmetic of an optimiser step, counted from the configuration alone: no torch, no device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from streamtrain.config.crops import CropSizes
from streamtrain.config.masks import max_rows
from streamtrain.config.model import HeadConfig, ModelConfig
from streamtrain.config.tree import Config
from streamtrain.planning.shapes import block_shapes


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of all ranks together; a multiply-add counts 2, and only matrix products count."""

    # what the method asks for: forward and backward of the student (two matrix products for the one of the forward),
    # forward of those who teach; nothing twice, and not what drop-path skips
    model: float
    # what is done: with all that is computed again to save memory
    executed: float

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(self.model + other.model, self.executed + other.executed)

    def __mul__(self, factor: float) -> StepFlops:
        return StepFlops(self.model * factor, self.executed * factor)


def step_flops(
    config: Config, world_size: int, sizes: CropSizes | None = None, teacher: Config | None = None
) -> StepFlops:
    """One optimiser step; divide by the global batch for an image's share. A Gram term counts where there is one.

    Args:
        sizes: of the step; None: the mean of the steps of a run whose sizes alternate.
        teacher: the configuration of a frozen teacher; None: it is as large as the student.

    Raises:
        ConfigError: if micro-batch x ranks does not divide the global batch.
    """
    _, accumulation = config.batch_split(world_size)
    shares = [entry.share for entry in config.crops.sizes] or [1.0]
    weighted = zip(shares, config.crop_sizes, strict=True) if sizes is None else [(sum(shares), sizes)]
    mean = StepFlops(0.0, 0.0)
    for share, one in weighted:
        mean += _micro_batch(config, one, teacher or config) * (share / sum(shares))
    return mean * (world_size * accumulation)


@dataclass(frozen=True)
class _Crops:
    """Crops of one size in a micro-batch, ``kept`` of which drop-path lets through each branch."""

    images: int
    patches: int
    kept: int

    @classmethod
    def of(cls, model: ModelConfig, images: int, size: int, drop_path: float) -> _Crops:
        kept = max(1, round((1.0 - drop_path) * images)) if images else 0
        return cls(images, (size // model.patch_size) ** 2, kept)


def _micro_batch(config: Config, sizes: CropSizes, teacher: Config) -> StepFlops:
    crops, objective, batch, drop = config.crops, config.objective, config.data.micro_batch, config.model.drop_path
    seen = _Crops.of(config.model, crops.global_count * batch, sizes.global_size, drop)
    local = _Crops.of(config.model, crops.local_count * batch, sizes.local_size, drop)
    rows = seen.images * seen.patches
    if config.teacher.kind == "ema":
        alignment = math.gcd(batch, config.masks.group)
        rows = max_rows(config.masks, batch, crops.global_count, seen.patches, alignment)
    # of the last block's result only these are read: CLS, and what is masked or all patches
    of_student = seen.images + (seen.images * seen.patches if objective.gram.is_active else rows)
    total = _student(config, seen, of_student) + _student(config, local, local.images)
    total += _forward(teacher.model, seen, seen.images + rows)

    ours, theirs = objective.global_loss.head, teacher.objective.global_loss.head
    total += _heads(config, teacher, ours, theirs, seen.images + local.images, seen.images)
    if objective.patch_loss.kind == "ibot":
        ours, theirs = objective.patch_loss.head, teacher.objective.patch_loss.head
        total += _heads(config, teacher, ours, theirs, rows, rows)
    if objective.gram.is_active:
        shown = _Crops.of(config.model, seen.images, sizes.gram_size or sizes.global_size, 0.0)
        every = shown.images * _tokens(config.model, shown)
        total += _forward(config.model, shown, every) + _gram_matrices(config, seen)
    return total


def _block(model: ModelConfig, crops: _Crops, images: int) -> tuple[float, float]:
    """The forward of a block's two branches, attention and MLP, for ``images`` of the crops."""
    matrices = {name: math.prod(shape) for name, shape in block_shapes(model).items() if len(shape) == 2}
    of_mlp = sum(numel for name, numel in matrices.items() if name.startswith("mlp."))
    tokens = _tokens(model, crops)
    rows = images * tokens
    attention = 2.0 * rows * (sum(matrices.values()) - of_mlp) + 4.0 * rows * tokens * model.dim
    return attention, 2.0 * rows * of_mlp


def _tokens(model: ModelConfig, crops: _Crops) -> int:
    """Of one image."""
    return 1 + model.num_registers + crops.patches


def _embedding(model: ModelConfig, crops: _Crops) -> float:
    return 2.0 * crops.images * crops.patches * 3 * model.patch_size**2 * model.dim


def _read_share(model: ModelConfig, crops: _Crops, read: int) -> float:
    """Of the crops' tokens: the last block's MLP computes no others."""
    return read / (crops.images * _tokens(model, crops)) if crops.images else 0.0


def _forward(model: ModelConfig, crops: _Crops, read: int) -> StepFlops:
    """A backbone without gradients, of whose result ``read`` tokens are read."""
    attention, mlp = _block(model, crops, crops.images)
    mlps = (model.depth - 1 + _read_share(model, crops, read)) * mlp
    flops = model.depth * attention + mlps + _embedding(model, crops)
    return StepFlops(flops, flops)


def _student(config: Config, crops: _Crops, read: int) -> StepFlops:
    """The student's backbone, forward and backward, of whose result ``read`` tokens are read."""
    model, engine = config.model, config.engine
    attention, mlp = _block(model, crops, crops.kept)
    share = _read_share(model, crops, read)
    attentions, mlps = model.depth * attention, (model.depth - 1 + share) * mlp
    # what is read of those that drop-path leaves out is computed and taken 0 times
    done = (model.depth - 1) * mlp + share * _block(model, crops, crops.images)[1]
    # a branch that is recomputed on its own ends before its last product, whose result was kept
    rows = 2.0 * crops.kept * _tokens(model, crops)
    inner_attentions = attentions - model.depth * rows * model.dim**2
    inner_done = done * (1.0 - rows * model.dim * model.hidden / mlp) if mlp else 0.0
    again = {"none": 0.0, "selective": inner_done, "block": attentions + done}[engine.checkpointing]
    if engine.view_groups > 1 and engine.checkpointing == "block":
        # the groups are recomputed within a block that is recomputed itself
        again += inner_attentions + inner_done
    # nobody asks for the gradient of the pixels
    embedding = 2.0 * _embedding(model, crops)
    return StepFlops(3.0 * (attentions + mlps) + embedding, 3.0 * (attentions + done) + embedding + again)


def _heads(
    config: Config, teacher: Config, ours: HeadConfig, theirs: HeadConfig, rows: int, teacher_rows: int
) -> StepFlops:
    """One head of the student and of the teacher, with the prototypes."""
    mlps = 6.0 * rows * _mlp(config.model, ours) + 2.0 * teacher_rows * _mlp(teacher.model, theirs)
    logits = 2.0 * rows * ours.prototypes * ours.bottleneck
    teacher_logits = 2.0 * teacher_rows * theirs.prototypes * theirs.bottleneck
    # the student's logits are computed twice; the teacher's in each iteration, and in the loss
    times = 1 + (config.objective.sinkhorn_iterations if config.objective.centering == "sinkhorn" else 1)
    return StepFlops(mlps + 3 * logits + teacher_logits, mlps + 4 * logits + times * teacher_logits)


def _mlp(model: ModelConfig, head: HeadConfig) -> int:
    """Values of a head's matrices before its prototypes."""
    sizes = [model.dim, *[head.hidden] * (head.layers - 1), head.bottleneck]
    return sum(inputs * outputs for inputs, outputs in pairwise(sizes))


def _gram_matrices(config: Config, crops: _Crops) -> StepFlops:
    """Similarities of the patches of each image, or of all images: of student and teacher, and their gradient."""
    patches = crops.patches if config.objective.gram.level == "image" else crops.images * crops.patches
    flops = 3 * 2.0 * crops.images * crops.patches * patches * config.model.dim
    return StepFlops(flops, flops)
