"""Search for settings that fit: location of the model states, recomputation and micro-batch size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from streamtrain.config.load import build, merge, parse_override
from streamtrain.config.tree import Config
from streamtrain.errors import ConfigError
from streamtrain.planning.machine import Machine, StepEstimate
from streamtrain.planning.memory import Plan

# larger micro-batches are no faster
MAX_MICRO_BATCH = 64
# no more ranks are suggested
MAX_RANKS = 1024

EXACT_MOMENTS = ("device", "host", "disk")


class Fit(NamedTuple):
    """Settings with which a run fits."""

    config: Config
    planned: Plan
    estimate: StepEstimate
    overrides: list[str]


def fit(config: Config, machine: Machine, micro_batch: int | None) -> Fit | None:
    """Find the fastest settings that fit, as overrides of ``config``; None if none do.

    8-bit moments change the results, so they are tried only if nothing exact fits. The global batch stays; a different
    micro-batch only changes KoLeo's neighbours.
    """
    total, _ = config.batch_split(machine.ranks)
    start = _reset(config)
    # on a CPU, device and host memory are the same
    exact = EXACT_MOMENTS if machine.on_gpu else ("device", "disk")
    averages = ("device", "host") if machine.on_gpu else ("device",)
    for moments in (exact, ("8bit",)):
        fitting = []
        for overrides in _candidates(total, machine.ranks, moments, averages, micro_batch):
            candidate = _override(start, overrides)
            planned = machine.plan(candidate)
            if machine.fits(planned):
                fitting.append(Fit(candidate, planned, machine.estimate_step(candidate, planned), overrides))
        if fitting:
            return min(fitting, key=lambda each: each.estimate.seconds)
    return None


@dataclass(frozen=True)
class Remedy:
    """One change with which a run fits."""

    # what to change, as overrides or as options of ``streamtrain plan``
    change: str
    planned: Plan
    seconds: float


def remedies(config: Config, machine: Machine) -> list[Remedy]:
    """Return the single changes with which the run fits, the fastest first; of each kind the smallest."""
    total, _ = config.batch_split(machine.ranks)
    fitting = []
    for kind in _single_changes(config, machine, total):
        for change, candidate, on in kind:
            planned = on.plan(candidate)
            if on.fits(planned):
                fitting.append(Remedy(change, planned, on.estimate_step(candidate, planned).seconds))
                break
    return sorted(fitting, key=lambda remedy: remedy.seconds)


def _single_changes(config: Config, machine: Machine, total: int) -> Iterator[Iterator[tuple[str, Config, Machine]]]:
    """Yield changes by kind, the smallest change of a kind first, each with the configuration and the machine."""
    engine, batch = config.engine, config.data.micro_batch

    def overridden(*changes: list[str]) -> Iterator[tuple[str, Config, Machine]]:
        return ((" ".join(change), _override(config, change), machine) for change in changes)

    smaller = [batch >> shift for shift in range(1, batch.bit_length()) if batch % (1 << shift) == 0]
    yield overridden(*([f"data.micro_batch={size}", f"data.global_batch={total}"] for size in smaller))
    if engine.checkpointing != "block":
        yield overridden(["engine.checkpointing=block"])
    if engine.moments == "device":
        yield overridden(*([f"engine.moments={place}"] for place in (("host",) if machine.on_gpu else ()) + ("disk",)))
        yield overridden(["engine.moments=8bit"])
    if machine.on_gpu:
        yield _more_gpus(config, machine)


def _more_gpus(config: Config, machine: Machine) -> Iterator[tuple[str, Config, Machine]]:
    ranks = 2 * machine.ranks
    while ranks <= MAX_RANKS:
        try:
            config.batch_split(ranks)
        except ConfigError:
            # this many GPUs do not divide the global batch
            return
        yield f"--gpus {ranks}", config, replace(machine, ranks=ranks)
        ranks *= 2


def _candidates(
    total: int, world_size: int, moments: tuple[str, ...], averages: tuple[str, ...], micro_batch: int | None
) -> Iterator[list[str]]:
    per_rank = total // world_size
    divisors = [size for size in range(1, min(per_rank, MAX_MICRO_BATCH) + 1) if per_rank % size == 0]
    batches = [micro_batch] if micro_batch else divisors[::-1]
    for location, ema, recompute, size in product(moments, averages, ("none", "selective", "block"), batches):
        yield [
            f"engine.moments={location}",
            f"teacher.average={ema}",
            f"engine.checkpointing={recompute}",
            f"data.micro_batch={size}",
            f"data.global_batch={total}",
        ]


def _reset(config: Config) -> Config:
    """Reset the keys that are invalid with some candidates."""
    defaults = {"moments_ratio": 1.0, "moments_dir": None, "view_groups": 1, "offload_checkpoints": False}
    return build(merge(config.model_dump(), {"engine": defaults}))


def _override(config: Config, overrides: list[str]) -> Config:
    raw = config.model_dump()
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return build(raw)
