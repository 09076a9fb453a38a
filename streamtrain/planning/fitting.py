"""Search for the fastest settings that fit: location of the model states, recomputation and micro-batch size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from streamtrain.config.load import build, merge, parse_override
from streamtrain.config.tree import Config
from streamtrain.planning.memory import Plan, plan

# rates per second of a recent GPU and its links, good enough to compare settings
FLOPS, GATHERED_BYTES, HOST_BYTES, DISK_BYTES = 400e12, 200e9, 25e9, 3e9
# kernel launches of one block, forward and backward
BLOCK_SECONDS = 2e-3
# larger micro-batches are no faster
MAX_MICRO_BATCH = 64

EXACT_MOMENTS = ("device", "host", "disk")


def step_seconds(config: Config, world_size: int, planned: Plan) -> float:
    """Estimate the time of one optimiser step on GPUs."""
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
    """Find the fastest settings that fit; returns them, their plan and the overrides of ``config``, or None.

    8-bit moments change the results, so they are tried only if nothing exact fits. The global batch stays; a different
    micro-batch only changes KoLeo's neighbours.
    """
    total, _ = config.batch_split(world_size)
    for moments in (EXACT_MOMENTS, ("8bit",)):
        fitting = []
        for overrides in _candidates(total, world_size, moments, micro_batch):
            candidate = _override(config, overrides)
            planned = plan(candidate, world_size)
            if fits(planned, gpu_memory, host_memory):
                fitting.append((step_seconds(candidate, world_size, planned), candidate, planned, overrides))
        if fitting:
            _, candidate, planned, overrides = min(fitting, key=lambda each: each[0])
            return candidate, planned, overrides
    return None


def fits(planned: Plan, gpu_memory: int, host_memory: int | None) -> bool:
    """Return whether the plan fits into each GPU and, unless ``host_memory`` is None, into each host."""
    return planned.gpu_bytes <= gpu_memory and (host_memory is None or planned.host_bytes <= host_memory)


def _candidates(total: int, world_size: int, moments: tuple[str, ...], micro_batch: int | None) -> Iterator[list[str]]:
    per_rank = total // world_size
    divisors = [size for size in range(1, min(per_rank, MAX_MICRO_BATCH) + 1) if per_rank % size == 0]
    batches = [micro_batch] if micro_batch else divisors[::-1]
    for location, ema, recompute, size in product(moments, ("device", "host"), ("none", "selective", "block"), batches):
        yield [
            f"engine.moments={location}",
            f"teacher.average={ema}",
            f"engine.checkpointing={recompute}",
            f"data.micro_batch={size}",
            f"data.global_batch={total}",
        ]


def _override(config: Config, overrides: list[str]) -> Config:
    # reset keys that are invalid with some candidates
    defaults = {"moments_ratio": 1.0, "moments_dir": None, "view_groups": 1, "offload_checkpoints": False}
    raw = merge(config.model_dump(), {"engine": defaults})
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return build(raw)
