"""The plan as text: the summary, the full table, and the lines that a run logs at its start and end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamtrain.config.tree import Config
from streamtrain.planning.fitting import Remedy
from streamtrain.planning.machine import Machine, StepEstimate
from streamtrain.planning.memory import Plan
from streamtrain.planning.parts import (
    ALWAYS,
    AVERAGE,
    BACKWARD,
    CHECKPOINT,
    EVALUATION,
    LOSS,
    OPTIMISER,
    PHASES,
    TARGETS,
    TEACHER,
)
from streamtrain.planning.shapes import parameter_shapes
from streamtrain.planning.sizes import ASSUMED_IMAGES
from streamtrain.planning.time import StepTime, mfu, smallest_hiding_micro_batch
from streamtrain.planning.units import duration, significant, size

_GPU_TITLES = {"gpu": "device memory per rank", "host": "host memory per rank", "disk": "disk, all ranks"}
_CPU_TITLES = {
    "gpu": "memory of the network, per process",
    "host": "other memory, per process",
    "disk": "disk, all ranks",
}
# buffers that the summary names
LARGEST = 3
_IN_PHASE = {
    TEACHER: "in the teacher pass",
    TARGETS: "while the targets are computed",
    LOSS: "in the prototype loss",
    BACKWARD: "in the backward pass",
    OPTIMISER: "in the optimiser step",
    AVERAGE: "in the update of the EMA",
    EVALUATION: "in the evaluation",
    CHECKPOINT: "while the last checkpoint is written",
}
# sizes of common GPUs
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)


def _gigabytes(num_bytes: float) -> str:
    """Format bytes as decimal gigabytes (1e9 bytes), with three significant digits."""
    return significant(num_bytes / 1e9)


def summary(planned: Plan, estimate: StepEstimate, config: Config, machine: Machine) -> str:
    """Return a few lines: whether the run fits, its peak with the largest buffers, its time and its disk space."""
    unit = "GPU" if machine.on_gpu else "process"
    phase, largest = largest_buffers(planned)
    names = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in largest)
    total, _ = config.batch_split(machine.ranks)
    seconds = estimate.seconds
    run = seconds * config.run.steps
    dtype = "bf16" if machine.bf16 else "fp32"
    of_each = "" if machine.on_gpu else f" of {_count(machine.cores, 'core')}"
    units = _count(machine.ranks, unit, "es" if unit == "process" else "s")
    lines = [
        _fitting_line(planned, machine),
        f"network   {_parameters(planned)}, in {dtype} on {units}{of_each}",
        f"peak      {size(planned.rank_bytes)} per {unit} {_IN_PHASE[phase]}; largest: {names}",
    ]
    if machine.on_gpu or machine.ranks > 1:
        lines.append(f"host      {size(planned.host_bytes)} for {_count(planned.ranks_per_host, 'rank')}")
    lines += [
        f"time      {duration(seconds)} per step of {_count(total, 'image')}, {duration(run)} for "
        f"{_count(config.run.steps, 'step')}, assuming {_rates(machine)}",
    ]
    if estimate.by_operation is not None:
        lines += _time_lines(estimate.by_operation, config, machine)
        lines.append(f"cost      {significant(run * machine.ranks / 3600)} GPU-hours")
    lines.append(f"disk      {size(planned.disk_bytes)} for checkpoints")
    if machine.images is None:
        why = f"{config.data.shards_text} cannot be read here" if config.data.shards else "data.shards is not set"
        lines.append(f"images    {significant(ASSUMED_IMAGES.pixels / 1e6)} megapixels, assumed because {why}")
    else:
        lines.append(f"images    {significant(machine.images.pixels / 1e6)} megapixels on average")
    return "\n".join(lines)


def _rates(machine: Machine) -> str:
    """Return the assumptions of the time that an option changes."""
    if not machine.on_gpu:
        return f"{significant(machine.flops / 1e12)} TFLOP/s per process (--tflops)"
    hardware = machine.hardware
    if hardware.flops:
        return f"matmuls at {significant(hardware.flops / 1e12)} TFLOP/s and other rates of {hardware.gpu.name} (--gpu)"
    return f"{hardware.gpu.name} GPUs (--gpu)"


def _time_lines(time: StepTime, config: Config, machine: Machine) -> list[str]:
    """Return the throughput and the causes of a step's time, the largest first."""
    images, _ = config.batch_split(machine.ranks)
    rate, share = images / time.seconds, mfu(config, machine.ranks, machine.hardware, time.seconds)
    parts = sorted(time.parts.items(), key=lambda part: -part[1])
    causes = ", ".join(f"{name} {part / time.seconds:.0%}" for name, part in parts if part >= 0.005 * time.seconds)
    lines = [
        f"speed     {significant(rate / machine.ranks)} images/s per GPU, {significant(rate)} in all; MFU {share:.0%}",
        f"causes    {causes}",
    ]
    if machine.ranks > 1 and not time.is_overlapped:
        lines.append(f"gathers   not overlapped, because engine.live_blocks is {config.engine.live_blocks}")
    elif machine.ranks > 1:
        size = smallest_hiding_micro_batch(config, machine.ranks, machine.hardware)
        hidden = "at no micro-batch" if size is None else f"from micro-batch {size}"
        lines.append(f"gathers   hidden behind computation {hidden}")
    return lines


def _parameters(planned: Plan) -> str:
    """Return the size of the backbone, which exports contain, and of the whole network."""
    backbone, whole = (significant(n / 1e6) for n in (planned.num_backbone_parameters, planned.num_parameters))
    return f"backbone of {backbone} M parameters, with heads {whole} M"


def largest_buffers(planned: Plan) -> tuple[str, list[tuple[str, int]]]:
    """Return the phase of a rank's peak, and the names and bytes of its largest buffers then."""
    phase = planned.peak_phase
    places = ("gpu",) if planned.on_gpu else ("gpu", "host")
    present = [p for p in planned.parts if p.location in places and {ALWAYS, phase} & set(p.when)]
    largest = sorted(present, key=lambda p: -p.num_bytes)[:LARGEST]
    return phase, [(p.name, p.num_bytes) for p in largest]


def _fitting_line(planned: Plan, machine: Machine) -> str:
    needs = [(planned.gpu_bytes, machine.gpu_memory, "GPU")] if machine.on_gpu else []
    needs.append((planned.host_bytes, machine.host_memory, "host"))
    checked = [(needed, there, what) for needed, there, what in needs if there is not None]
    if not checked:
        cards = [f"{card} GB" for card in CARDS if card * 1e9 >= planned.gpu_bytes]
        enough = f"enough are GPUs of {', '.join(cards[:4])}" if cards else "more than any common GPU has"
        return f"needs     {size(planned.gpu_bytes)} per GPU; {enough} (--gpu-memory checks one)"
    texts = []
    for needed, there, what in checked:
        spare = f"{size(there - needed)} to spare" if needed <= there else f"{size(needed - there)} too much"
        texts.append(f"{size(needed)} of {size(there)} per {what}, {spare}")
    return f"{'fits      ' if machine.fits(planned) else 'does NOT fit: '}{'; '.join(texts)}"


def advice(single: Sequence[Remedy], combined: Sequence[str] | None) -> str:
    """Return what to change where a run does not fit.

    Args:
        single: changes with which it fits.
        combined: overrides with which it fits, if no single change is enough; None: there are none.
    """
    lines = ["it fits with one of these changes:"] if single else []
    for remedy in single:
        peak = size(remedy.planned.rank_bytes)
        lines.append(f"  {remedy.change:44} peak {peak}, {duration(remedy.seconds)} per step")
    if combined:
        lines.append(f"{'or' if single else 'it fits'} with these changes together:\n  {' '.join(combined)}")
    return "\n".join(lines) or "no settings of this network fit; use a smaller model.preset or crops, or more memory"


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def table(planned: Plan, world_size: int) -> str:
    """Format every buffer with its arithmetic, the memory of each phase, and the totals of an optimiser step."""
    lines = [
        f"{planned.num_parameters:,} parameters with heads, {planned.num_backbone_parameters:,} in the backbone, on "
        f"{world_size} rank(s); sizes in GB (1e9 bytes)"
    ]
    for location, title in (_GPU_TITLES if planned.on_gpu else _CPU_TITLES).items():
        parts = [part for part in planned.parts if part.location == location]
        if parts:
            lines.append(f"\n{title}:")
        for part in parts:
            when = "" if ALWAYS in part.when else f"  [{', '.join(part.when)}]"
            lines.append(f"  {part.name:38} {_gigabytes(part.num_bytes):>9}  = {part.arithmetic}{when}")
    lines.append(f"\n{'device memory' if planned.on_gpu else 'memory of the process'} per rank, by phase:")
    for phase in PHASES:
        peak = "  <- peak" if phase == planned.peak_phase else ""
        lines.append(f"  {phase:38} {_gigabytes(planned.rank_bytes_at(phase)):>9}{peak}")
    host = f"host memory of {planned.ranks_per_host} rank(s)"
    lines.append(f"{host:40} {_gigabytes(planned.host_bytes):>9}")
    lines.append(f"{'disk':40} {_gigabytes(planned.disk_bytes):>9}")
    lines.append(
        f"per optimiser step: {significant(planned.flops_per_step / 1e12)} TFLOP on all ranks; each rank receives "
        f"{_gigabytes(planned.all_gather_bytes_per_step)} GB of parameters and transfers "
        f"{_gigabytes(planned.transfer_bytes_per_step)} GB to and from host memory or disk"
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
    heads = sum(numel for part, numel in numels.items() if part in ("global_head", "patch_head", "projector"))
    total = sum(numels.values())
    lines = [f"{name:34} {numel:>14,}" for name, numel in (("backbone", total - heads), ("with heads", total))]
    for part, members in parts.items():
        if part.startswith("blocks.") and part != "blocks.0":
            continue
        shown = f"each of {config.model.depth} blocks" if part == "blocks.0" else part
        lines.append(f"\n{shown:34} {numels[part]:>14,}")
        lines += [f"  {name:32} {math.prod(shape):>14,}   {' x '.join(map(str, shape))}" for name, shape in members]
    return "\n".join(lines)


def start_summary(planned: Plan) -> str:
    """Return one line for the start of a run."""
    phase, ((name, num_bytes), *_) = largest_buffers(planned)
    unit, peak = "GPU" if planned.on_gpu else "rank", size(planned.rank_bytes)
    return (
        f"plan: {_parameters(planned)}; peak {peak} per {unit} {_IN_PHASE[phase]} "
        f"(largest: {name}, {size(num_bytes)}); {size(planned.disk_bytes)} on disk"
    )


def end_summary(planned: Plan, measured_bytes: float) -> str:
    """Return one line for the end of a run; ``measured_bytes`` is the highest peak of any rank."""
    expected = planned.rank_bytes
    return f"memory: measured peak {size(measured_bytes)}, planned {size(expected)} ({measured_bytes / expected:.0%})"
