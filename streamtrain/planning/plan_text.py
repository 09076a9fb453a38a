"""A plan for people: a table with the arithmetic, and what a run says at its start and its end."""

from __future__ import annotations

import math

from streamtrain.config.tree import Config
from streamtrain.planning.memory import ALWAYS, PHASES, Plan
from streamtrain.planning.shapes import parameter_shapes

_PLACES = {"gpu": "on each device", "host": "in host memory, each rank", "disk": "on disk, all ranks"}


def gigabytes(num_bytes: float) -> str:
    """Decimal gigabytes, as memory is sold."""
    return f"{num_bytes / 1e9:,.2f}"


def table(planned: Plan, world_size: int) -> str:
    """Every buffer with its arithmetic, the phases, and what a step costs."""
    lines = [f"{planned.num_parameters:,} parameters on {world_size} rank(s); gigabytes of 1e9 bytes"]
    for place, title in _PLACES.items():
        parts = [part for part in planned.parts if part.place == place]
        if parts:
            lines.append(f"\n{title}:")
        for part in parts:
            when = "" if ALWAYS in part.when else f"  [{', '.join(part.when)}]"
            lines.append(f"  {part.name:28} {gigabytes(part.num_bytes):>9}  = {part.sum}{when}")
    lines.append("\non each device, by phase:")
    for phase in PHASES:
        peak = "  <- peak" if phase == planned.peak_phase else ""
        lines.append(f"  {phase:28} {gigabytes(planned.at(phase)):>9}{peak}")
    lines.append(f"host memory of {planned.ranks_a_host} rank(s) {gigabytes(planned.host_bytes):>14}")
    lines.append(f"disk {gigabytes(planned.disk_bytes):>35}")
    lines.append(
        f"an optimiser step: {planned.flops_per_step / 1e12:,.1f} TFLOP over all ranks; each rank receives "
        f"{gigabytes(planned.all_gather_bytes_per_step)} GB of parameters and moves "
        f"{gigabytes(planned.transfer_bytes_per_step)} GB to and from its host or disk"
    )
    return "\n".join(lines)


def model_table(config: Config) -> str:
    """The student's parameters and their shapes, part by part; of equal blocks the first one."""
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


def at_start(planned: Plan, on_gpu: bool) -> str:
    """One line for the start of a run."""
    states, peak = gigabytes(planned.state_bytes), gigabytes(of_rank(planned, on_gpu))
    return (
        f"plan: {planned.num_parameters / 1e6:,.1f} M parameters; each {'GPU' if on_gpu else 'rank'} {states} GB of "
        f"states and {peak} GB at the peak ({planned.peak_phase}); checkpoints "
        f"{gigabytes(planned.disk_bytes)} GB of disk"
    )


def at_end(planned: Plan, on_gpu: bool, measured_bytes: float) -> str:
    """One line for the end of a run: ``measured_bytes`` is the most that a rank has held."""
    expected = of_rank(planned, on_gpu)
    return (
        f"memory: {gigabytes(measured_bytes)} GB measured at the peak, {gigabytes(expected)} GB planned "
        f"({measured_bytes / expected:.0%})"
    )


def of_rank(planned: Plan, on_gpu: bool) -> int:
    """A rank's peak on its GPU, or all of its process where it has none."""
    if on_gpu:
        return planned.gpu_bytes
    return max(planned.at(phase) + planned.at(phase, "host") for phase in PHASES)
