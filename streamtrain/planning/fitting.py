"""The fastest settings that fit: tries where the states lie, what is recomputed and how large a micro-batch is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from streamtrain.config.load import build, merge, parse_override
from streamtrain.config.tree import Config
from streamtrain.planning.memory import Plan, plan

# for comparing settings with one another, not for predicting: a recent GPU and its links, per second
FLOPS, GATHERED_BYTES, HOST_BYTES, DISK_BYTES = 400e12, 200e9, 25e9, 3e9
# starting the kernels of one block, forward and backward
BLOCK_SECONDS = 2e-3
# above this the largest micro-batch gains nothing more
MOST_IMAGES = 64

Moments = ("device", "host", "disk")


def step_seconds(config: Config, world_size: int, planned: Plan) -> float:
    """A rough time of one optimiser step on GPUs."""
    _, accumulation = config.batch_split(world_size)
    link = DISK_BYTES if config.engine.moments == "disk" else HOST_BYTES
    return (
        planned.flops_per_step / world_size / FLOPS
        + planned.all_gather_bytes_per_step / GATHERED_BYTES
        + planned.transfer_bytes_per_step / link
        + accumulation * config.model.depth * BLOCK_SECONDS
    )


def fit(
    config: Config, world_size: int, gpu_memory: int, host_memory: int | None, micro_batch: int | None
) -> tuple[Config, Plan, list[str]] | None:
    """The fastest settings that fit, their plan, and the overrides that make ``config`` so; None if none fit.

    8-bit moments change the arithmetic, so they are tried only where nothing exact fits. The global batch stays:
    a different micro-batch changes KoLeo's neighbours only.
    """
    total, _ = config.batch_split(world_size)
    for moments in (Moments, ("8bit",)):
        found = []
        for overrides in _candidates(total, world_size, moments, micro_batch):
            candidate = _override(config, overrides)
            planned = plan(candidate, world_size)
            if fits(planned, gpu_memory, host_memory):
                found.append((step_seconds(candidate, world_size, planned), candidate, planned, overrides))
        if found:
            _, candidate, planned, overrides = min(found, key=lambda each: each[0])
            return candidate, planned, overrides
    return None


def fits(planned: Plan, gpu_memory: int, host_memory: int | None) -> bool:
    """Whether each GPU and (where its size is given) each host has room."""
    return planned.gpu_bytes <= gpu_memory and (host_memory is None or planned.host_bytes <= host_memory)


def _candidates(
    total: int, world_size: int, moments: tuple[str, ...], micro_batch: int | None
) -> Iterator[list[str]]:
    of_rank = total // world_size
    divisors = [size for size in range(1, min(of_rank, MOST_IMAGES) + 1) if of_rank % size == 0]
    batches = [micro_batch] if micro_batch else divisors[::-1]
    for where, average, again, size in product(moments, ("device", "host"), ("none", "selective", "block"), batches):
        yield [
            f"engine.moments={where}",
            f"teacher.average={average}",
            f"engine.checkpointing={again}",
            f"data.micro_batch={size}",
            f"data.global_batch={total}",
        ]


def _override(config: Config, overrides: list[str]) -> Config:
    # keys that would have no effect beside the candidate's
    plain = {"moments_ratio": 1.0, "moments_dir": None, "view_groups": 1, "offload_checkpoints": False}
    raw = merge(config.model_dump(), {"engine": plain})
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return build(raw)
