"""The plan as text: the full table, and the lines that a run logs at its start and end."""

from __future__ import annotations

import math

from streamtrain.config.tree import Config
from streamtrain.planning.memory import ALWAYS, PHASES, Plan
from streamtrain.planning.shapes import parameter_shapes

_TITLES = {"gpu": "device memory per rank", "host": "host memory per rank", "disk": "disk, all ranks"}


def gigabytes(num_bytes: float) -> str:
    """Format bytes as decimal gigabytes (1e9 bytes)."""
    return f"{num_bytes / 1e9:,.2f}"


def table(planned: Plan, world_size: int) -> str:
    """Format every buffer with its arithmetic, the memory of each phase, and the totals of an optimiser step."""
    lines = [f"{planned.num_parameters:,} parameters on {world_size} rank(s); sizes in GB (1e9 bytes)"]
    for location, title in _TITLES.items():
        parts = [part for part in planned.parts if part.location == location]
        if parts:
            lines.append(f"\n{title}:")
        for part in parts:
            when = "" if ALWAYS in part.when else f"  [{', '.join(part.when)}]"
            lines.append(f"  {part.name:28} {gigabytes(part.num_bytes):>9}  = {part.arithmetic}{when}")
    lines.append("\ndevice memory per rank, by phase:")
    for phase in PHASES:
        peak = "  <- peak" if phase == planned.peak_phase else ""
        lines.append(f"  {phase:28} {gigabytes(planned.at(phase)):>9}{peak}")
    host = f"host memory of {planned.ranks_per_host} rank(s)"
    lines.append(f"{host:30} {gigabytes(planned.host_bytes):>9}")
    lines.append(f"{'disk':30} {gigabytes(planned.disk_bytes):>9}")
    lines.append(
        f"per optimiser step: {planned.flops_per_step / 1e12:,.1f} TFLOP on all ranks; each rank receives "
        f"{gigabytes(planned.all_gather_bytes_per_step)} GB of parameters and transfers "
        f"{gigabytes(planned.transfer_bytes_per_step)} GB to and from host memory or disk"
    )
    return "\n".join(lines)


def model_table(config: Config) -> str:
    """Format the student's parameters with their shapes, by module; identical blocks are listed once."""
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in parameter_shapes(config).items():
        pieces = name.removeprefix("backbone.").split(".")
        depth = 2 if pieces[0] == "blocks" else 1
        parts.setdefault(".".join(pieces[:depth]), []).append((".".join(pieces[depth:]), shape))
    numels = {part: sum(math.prod(shape) for _, shape in members) for part, members in parts.items()}
    lines = [f"{'all parameters':34} {sum(numels.values()):>14,}"]
    for part, members in parts.items():
        if part.startswith("blocks.") and part != "blocks.0":
            continue
        shown = f"each of {config.model.depth} blocks" if part == "blocks.0" else part
        lines.append(f"\n{shown:34} {numels[part]:>14,}")
        lines += [f"  {name:32} {math.prod(shape):>14,}   {' x '.join(map(str, shape))}" for name, shape in members]
    return "\n".join(lines)


def start_summary(planned: Plan, on_gpu: bool) -> str:
    states, peak = gigabytes(planned.state_bytes), gigabytes(rank_peak_bytes(planned, on_gpu))
    return (
        f"plan: {planned.num_parameters / 1e6:,.1f} M parameters; per {'GPU' if on_gpu else 'rank'} {states} GB of "
        f"model states and a peak of {peak} GB ({planned.peak_phase}); {gigabytes(planned.disk_bytes)} GB on disk"
    )


def end_summary(planned: Plan, on_gpu: bool, measured_bytes: float) -> str:
    """Return one line for the end of a run; ``measured_bytes`` is the highest peak of any rank."""
    expected = rank_peak_bytes(planned, on_gpu)
    return (
        f"memory: measured peak {gigabytes(measured_bytes)} GB, planned {gigabytes(expected)} GB "
        f"({measured_bytes / expected:.0%})"
    )


def rank_peak_bytes(planned: Plan, on_gpu: bool) -> int:
    """Return a rank's peak memory: on its GPU, or without a GPU in its process."""
    if on_gpu:
        return planned.gpu_bytes
    return max(planned.at(phase) + planned.at(phase, "host") for phase in PHASES)
