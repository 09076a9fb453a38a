"""The FLOPs of an optimiser step, computed from the configuration alone, without torch or a device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from streamtrain.config.crops import CropSizes
from streamtrain.config.masks import max_rows
from streamtrain.config.model import HeadConfig, ModelConfig, is_adapter
from streamtrain.config.section import ImageSize
from streamtrain.config.tree import Config
from streamtrain.planning.shapes import backbone_shapes, block_shapes, projector_shapes

# patches that are compared: of an image, or of a micro-batch
Level = Literal["image", "batch"]


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of all ranks; only matmuls count, a multiply-add as 2."""

    # required by the method: the student's forward and backward (twice the forward), and the teachers' forward, without
    # recomputation and samples skipped by drop-path
    model: float
    # with recomputation
    executed: float

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(self.model + other.model, self.executed + other.executed)

    def __mul__(self, factor: float) -> StepFlops:
        return StepFlops(self.model * factor, self.executed * factor)


def step_flops(
    config: Config, world_size: int, sizes: CropSizes | None = None, teacher: Config | None = None
) -> StepFlops:
    """Return the FLOPs of one optimiser step, with a frozen Gram teacher and anchor if any.

    Divide by the global batch for one image.

    Args:
        sizes: crop sizes of the step; None: the mean over the run's alternating sizes.
        teacher: the configuration of a frozen teacher; None: the student's.

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
class Crops:
    """Crops of one size in a micro-batch; drop-path keeps ``kept`` of them in each branch."""

    images: int
    patches: int
    kept: int

    @classmethod
    def of(cls, model: ModelConfig, images: int, size: ImageSize, drop_path: float) -> Crops:
        kept = max(1, round((1.0 - drop_path) * images)) if images else 0
        return cls(images, size.patches(model.patch_size), kept)

    def tokens(self, model: ModelConfig) -> int:
        """Return the number of tokens of one crop."""
        return 1 + model.num_registers + self.patches


def _micro_batch(config: Config, sizes: CropSizes, teacher: Config) -> StepFlops:
    objective = config.objective
    full, local, rows = micro_batch_crops(config, sizes)
    used = used_tokens(config, full, rows)
    total = _student(config, full, used) + _student(config, local, local.images)
    total += _frozen_backbones(config, sizes, full)
    if (backbone := config.teacher.backbone) is not None:
        crops = Crops.of(backbone, full.images, sizes.global_size, 0.0)
        # all tokens are normalised, since the patches are resized to the student's grid
        total += _forward(backbone, crops, crops.images * crops.tokens(backbone))
        flops = 6.0 * (full.images + local.images + rows) * projector_weights(config, backbone)
        return total + StepFlops(flops, flops)
    total += _forward(teacher.model, full, full.images + rows)

    head, teacher_head = objective.global_loss.head, teacher.objective.global_loss.head
    total += _heads(config, teacher, head, teacher_head, full.images + local.images, full.images)
    if objective.patch_loss.kind == "ibot":
        head, teacher_head = objective.patch_loss.head, teacher.objective.patch_loss.head
        total += _heads(config, teacher, head, teacher_head, rows, rows)
    return total


def _frozen_backbones(config: Config, sizes: CropSizes, full: Crops) -> StepFlops:
    """Return the FLOPs of the Gram teacher and of the anchor, with their losses; none without these terms."""
    objective, flops = config.objective, 0.0
    if objective.gram.is_active:
        gram = Crops.of(config.model, full.images, sizes.gram_size or sizes.global_size, 0.0)
        flops += _forward(config.model, gram, gram.images * gram.tokens(config.model)).model
        flops += gram_flops(config, full, objective.gram.level)
    if objective.anchor.is_active:
        anchor = Crops.of(config.model, full.images, sizes.global_size, 0.0)
        flops += _forward(config.model, anchor, anchor.images * anchor.tokens(config.model)).model
        flops += gram_flops(config, full, "image") if objective.anchor.patches == "gram" else 0.0
    return StepFlops(flops, flops)


def micro_batch_crops(config: Config, sizes: CropSizes) -> tuple[Crops, Crops, int]:
    """Return the global and local crops of a micro-batch, and the patches that the patch loss uses."""
    crops, batch, drop = config.crops, config.data.micro_batch, config.model.drop_path
    full = Crops.of(config.model, crops.global_count * batch, sizes.global_size, drop)
    local = Crops.of(config.model, crops.local_count * batch, sizes.local_size, drop)
    if config.teacher.kind != "ema":
        return full, local, full.images * full.patches
    alignment = math.gcd(batch, config.masks.group)
    return full, local, max_rows(config.masks, batch, config.crops.global_count, full.patches, alignment)


def used_tokens(config: Config, full: Crops, rows: int) -> int:
    """Return the global crops' output tokens of the last block that are used: CLS, and the masked or all patches."""
    return full.images + (full.images * full.patches if config.objective.compares_all_patches else rows)


def block_flops(model: ModelConfig, crops: Crops, images: int) -> tuple[float, float, float]:
    """Return a block's forward FLOPs for ``images`` of the crops: attention's linear layers, its scores, the MLP."""
    matrices = {name: math.prod(shape) for name, shape in block_shapes(model).items() if len(shape) == 2}
    mlp = sum(numel for name, numel in matrices.items() if name.startswith("mlp."))
    tokens = crops.tokens(model)
    rows = images * tokens
    return 2.0 * rows * (sum(matrices.values()) - mlp), 4.0 * rows * tokens * model.dim, 2.0 * rows * mlp


def _block(model: ModelConfig, crops: Crops, images: int) -> tuple[float, float]:
    """Return the forward FLOPs of a block's attention and MLP branch for ``images`` of the crops."""
    linear, scores, mlp = block_flops(model, crops, images)
    return linear + scores, mlp


def embedding_flops(model: ModelConfig, crops: Crops) -> float:
    """Return the forward FLOPs of the patch embedding."""
    return 2.0 * crops.images * crops.patches * model.channels * model.patch_size**2 * model.dim


def used_share(model: ModelConfig, crops: Crops, used: int) -> float:
    """Return the share of the crops' tokens that are used; the last block's MLP computes only these."""
    return used / (crops.images * crops.tokens(model)) if crops.images else 0.0


def _forward(model: ModelConfig, crops: Crops, used: int) -> StepFlops:
    """Return the FLOPs of a backbone's forward without gradients; ``used`` of its output tokens are used."""
    attention, mlp = _block(model, crops, crops.images)
    mlps = (model.depth - 1 + used_share(model, crops, used)) * mlp
    flops = model.depth * attention + mlps + embedding_flops(model, crops)
    return StepFlops(flops, flops)


def _student(config: Config, crops: Crops, used: int) -> StepFlops:
    """Return the FLOPs of the student backbone's forward and backward; ``used`` of its output tokens are used."""
    model, engine = config.model, config.engine
    attention, mlp = _block(model, crops, crops.kept)
    share = used_share(model, crops, used)
    attentions, mlps = model.depth * attention, (model.depth - 1 + share) * mlp
    # the last MLP computes the used tokens of all samples, and multiplies those of skipped samples by 0
    executed_mlps = (model.depth - 1) * mlp + share * _block(model, crops, crops.images)[1]
    # recomputing a single branch stops before its last matmul, whose output was saved
    rows = 2.0 * crops.kept * crops.tokens(model)
    inner_attentions = attentions - model.depth * rows * model.dim**2
    inner_mlps = executed_mlps * (1.0 - rows * model.dim * model.hidden / mlp) if mlp else 0.0
    recomputed = {"none": 0.0, "selective": inner_mlps, "block": attentions + executed_mlps}[engine.checkpointing]
    if engine.view_groups > 1 and engine.checkpointing == "block":
        # the view groups are recomputed once more inside the recomputed block
        recomputed += inner_attentions + inner_mlps
    # the pixels need no gradient
    embedding = 2.0 * embedding_flops(model, crops)
    executed = 3.0 * (attentions + executed_mlps) + embedding + recomputed
    saved = _frozen_backward(model, crops, share, recomputed)
    return StepFlops(3.0 * (attentions + mlps) + embedding - saved.model, executed - saved.executed)


def _frozen_backward(model: ModelConfig, crops: Crops, share: float, recomputed: float) -> StepFlops:
    """Return the FLOPs of a whole backbone's backward that frozen parameters leave out.

    These are the gradients of frozen matrices, and the backward and the recomputation of blocks below the first trained
    one. Arguments as in ``_student``; the adapters of blocks without any are counted too.
    """
    if not model.lora.rank:
        return StepFlops(0.0, 0.0)
    below = model.depth - len(model.trained_blocks)
    frozen = {"attention": 0, "mlp": 0}
    for name, shape in block_shapes(model).items():
        if len(shape) == 2 and not is_adapter(name):
            frozen[name.partition(".")[0]] += math.prod(shape)
    tokens = 2.0 * crops.tokens(model)
    ends_adapted = model.depth - 1 in model.adapted_blocks
    backward = below * 2.0 * sum(_block(model, crops, crops.kept)) + embedding_flops(model, crops)
    backward += len(model.adapted_blocks) * tokens * crops.kept * frozen["attention"]
    backward += (len(model.adapted_blocks) - ends_adapted) * tokens * crops.kept * frozen["mlp"]
    last = ends_adapted * share * tokens * frozen["mlp"]
    rest = recomputed * below / model.depth
    return StepFlops(backward + last * crops.kept, backward + last * crops.images + rest)


def trained_share(model: ModelConfig, branch: str) -> float:
    """Return the share of the matrices of all blocks' ``attention`` or ``mlp`` that train."""
    if not model.lora.rank:
        return 1.0
    shapes = {
        name: shape for name, shape in backbone_shapes(model).items() if f".{branch}." in name and len(shape) == 2
    }
    trained = sum(math.prod(shape) for name, shape in shapes.items() if model.is_trained(name))
    return trained / sum(map(math.prod, shapes.values()))


def _heads(
    config: Config, teacher: Config, head: HeadConfig, teacher_head: HeadConfig, rows: int, teacher_rows: int
) -> StepFlops:
    """Return the FLOPs of one head of the student and of the teacher, with the prototypes."""
    teacher_weights = head_weights(teacher.model, teacher_head)
    mlps = 6.0 * rows * head_weights(config.model, head) + 2.0 * teacher_rows * teacher_weights
    logits = 2.0 * rows * head.prototypes * head.bottleneck
    teacher_logits = 2.0 * teacher_rows * teacher_head.prototypes * teacher_head.bottleneck
    # the student's logits are computed twice, the teacher's in each Sinkhorn iteration and in the loss
    times = 1 + (config.objective.sinkhorn_iterations if config.objective.centering == "sinkhorn" else 1)
    return StepFlops(mlps + 3 * logits + teacher_logits, mlps + 4 * logits + times * teacher_logits)


def head_weights(model: ModelConfig, head: HeadConfig) -> int:
    """Return the number of weights of a head's MLP, without biases."""
    sizes = [model.dim, *[head.hidden] * (head.layers - 1), head.bottleneck]
    return sum(inputs * outputs for inputs, outputs in pairwise(sizes))


def projector_weights(config: Config, teacher: ModelConfig) -> int:
    """Return the number of weights of the projector to a feature teacher's width, without biases."""
    return sum(math.prod(shape) for shape in projector_shapes(config, teacher).values() if len(shape) == 2)


def gram_flops(config: Config, crops: Crops, level: Level) -> float:
    """Return the FLOPs of the student's and the teacher's patch similarities and their gradient."""
    patches = crops.patches if level == "image" else crops.images * crops.patches
    return 3 * 2.0 * crops.images * crops.patches * patches * config.model.dim
