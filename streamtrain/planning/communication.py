"""The time of collective operations in an optimiser step, and the sizes that decide their number."""

from __future__ import annotations

import math

from streamtrain.config.tree import Config
from streamtrain.ops.chunks import chunk_rows
from streamtrain.planning.flops import micro_batch_crops
from streamtrain.planning.hardware import HOP_SECONDS, OTHER_MODULES, REDUCE_SECONDS, Hardware
from streamtrain.planning.parts import BACKWARD, FORWARD, TEACHER
from streamtrain.planning.shapes import backbone_shapes, parameter_shapes, trained_shapes


def _numels(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


def num_values(config: Config) -> int:
    """Return the number of the student's parameters."""
    return _numels(tuple(parameter_shapes(config).items()))


def num_trained(config: Config) -> int:
    """Return the number of the student's trained parameters."""
    return _numels(tuple(trained_shapes(config).items()))


def collective_seconds(config: Config, world_size: int, hardware: Hardware, accumulation: int) -> dict[str, float]:
    """Return the seconds by phase of the collectives that may overlap with its computation."""
    if world_size == 1:
        return {}
    item = 2 if hardware.bf16 else 4
    received = item * num_values(config) * (world_size - 1) / world_size / hardware.gather_rate(world_size)
    latency = (config.model.depth + OTHER_MODULES) * world_size * HOP_SECONDS
    one_pass = accumulation * (received + latency)
    gathers = {TEACHER: one_pass, FORWARD: one_pass, BACKWARD: 2 * one_pass}
    if (teacher := config.teacher.backbone) is not None:
        numel = sum(math.prod(shape) for shape in backbone_shapes(teacher).values())
        latency = (teacher.depth + OTHER_MODULES) * world_size * HOP_SECONDS
        gathers[TEACHER] = accumulation * (item * numel / hardware.gather_rate(world_size) + latency)
    num_frozen = config.objective.gram.is_active + config.objective.anchor.is_active
    if num_frozen:
        latency = (config.model.depth + OTHER_MODULES) * world_size * HOP_SECONDS
        backbone = sum(math.prod(shape) for shape in backbone_shapes(config.model).values())
        gathers[TEACHER] += num_frozen * accumulation * (item * backbone / hardware.gather_rate(world_size) + latency)
    return gathers


def target_seconds(config: Config, world_size: int, accumulation: int) -> float:
    """Return the seconds of the all-reduces that the targets wait for: two per chunk in the first iteration, then one.

    Assumes the first crop sizes in every step.
    """
    if world_size == 1 or config.objective.centering != "sinkhorn" or config.teacher.model is not None:
        return 0.0
    full, _, masked = micro_batch_crops(config, config.crop_sizes[0])
    heads = [(config.objective.global_loss.head, full.images)]
    if config.objective.patch_loss.kind == "ibot":
        heads.append((config.objective.patch_loss.head, masked))
    chunks = sum(
        math.ceil(
            head.prototypes / chunk_rows(config.objective.chunk_size(on_gpu=True), accumulation * rows, head.prototypes)
        )
        for head, rows in heads
    )
    return REDUCE_SECONDS * chunks * (config.objective.sinkhorn_iterations + 1)
