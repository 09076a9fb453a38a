"""``streamtrain plan``: estimate memory, time and disk space of a run, without starting it."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from shards.errors import ShardError
from streamtrain.cli.arguments import add_command, byte_size, positive_int
from streamtrain.config.load import load_config
from streamtrain.config.tree import Config
from streamtrain.engine.runtime import uses_bf16
from streamtrain.errors import StreamtrainError
from streamtrain.interop.feature_teacher import with_teacher_model
from streamtrain.ops.cpu.features import cpu_features, has_kernels
from streamtrain.planning.fitting import Remedy, fit, remedies
from streamtrain.planning.hardware import DEFAULT_GPU, LOADER_RATE, MATMUL_SHARE, NETWORK_RATE, Hardware
from streamtrain.planning.images import configured_images
from streamtrain.planning.machine import Machine, StepEstimate, core_flops
from streamtrain.planning.memory import Plan
from streamtrain.planning.parts import PHASES
from streamtrain.planning.peak import Gpu, gpu_of_option
from streamtrain.planning.plan_text import advice, summary, table
from streamtrain.planning.sizes import CPU_KERNELS
from streamtrain.planning.time import StepTime, mfu, smallest_hiding_micro_batch
from streamtrain.run.machine import available_cores, has_gpu_driver, host_memory

# CPU cores per GPU of a host with eight H100s
CORES_PER_GPU = 14

_SUMMARY = "Estimate the memory, the time and the disk space of a run, without starting it."
_DETAILS = """\
Prints whether the run fits, its peak memory, its time and its disk space. If it does not fit, the exit
status is 1, and the last lines name changes that make it fit. --verbose also prints every buffer of a
rank with its arithmetic. --fit searches for the fastest settings that fit and prints them as overrides.

With --device cpu, the plan is for CPUs like this machine's, and memory is compared with the available
memory of this machine. Times on GPUs are predicted operation by operation (docs/performance.md). Times
on CPUs follow from the printed FLOP/s. No prediction has been compared with a run on a GPU yet.

Sizes such as 80GB are decimal: 80 000 000 000 bytes, slightly less than a GPU of that name has. Sizes
such as 80GiB are binary.
"""
_EXAMPLES = """\
  streamtrain plan --config vits16.yaml
  streamtrain plan --config quickstart.yaml --device cpu data.shards=sets/photos
  streamtrain plan --config giant.yaml --gpus 256 --gpu h100 --network 400
  streamtrain plan --config giant.yaml --gpus 1 --gpu-memory 141GB --host-memory 128GB --fit
  streamtrain plan --config vitl16.yaml --gpus 4 --gpu-memory 24GB --json data.micro_batch=16
"""

logger = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "plan", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("--config", required=True, help="recipe, as for training")
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), help="where the ranks compute (default: engine.device, or gpu if auto)"
    )
    parser.add_argument(
        "--gpus", "--ranks", dest="ranks", type=positive_int, default=1, metavar="N",
        help="number of ranks: GPUs, or processes with --device cpu (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", type=_gpu, metavar="NAME",
        help=f"model of the GPU, such as h100, h200, a100 or rtx4090; sets the time and the default of "
        f"--gpu-memory (default: {DEFAULT_GPU.option}, for the time only)",
    )  # fmt: skip
    parser.add_argument(
        "--network", type=_positive_float, metavar="GBIT",
        help=f"Gbit/s per GPU between hosts (default: {NETWORK_RATE * 8 / 1e9:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "--loader-rate", type=_positive_float, metavar="N",
        help=f"images/s of one host's loader, as measured by bench.py loader (default: {LOADER_RATE:.0f}, assumed)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-memory", type=byte_size, metavar="SIZE",
        help="memory of one GPU, such as 80GB (default: the capacity of --gpu; without --gpu, the plan lists the "
        "common sizes that are enough)",
    )  # fmt: skip
    parser.add_argument(
        "--host-memory", type=byte_size, metavar="SIZE",
        help="memory of one host (default with --device cpu: this machine's available memory; otherwise not checked)",
    )  # fmt: skip
    parser.add_argument(
        "--tflops", type=_positive_float, metavar="X",
        help="TFLOP/s of a rank in bf16 matmuls; FP8 matmuls are scaled by the ratio of the assumed rates. Default on "
        f"a GPU: at most {100 * MATMUL_SHARE:.0f} %% of the peak, less for small matmuls. Default on a CPU: estimated "
        "from its instructions and cores",
    )  # fmt: skip
    parser.add_argument(
        "--micro-batch", type=positive_int, metavar="N", help="images per micro-batch, as data.micro_batch"
    )
    parser.add_argument("--fit", action="store_true", help="search for the fastest settings that fit")
    parser.add_argument("--verbose", action="store_true", help="print every buffer with its arithmetic")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for training")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan of a run.

    Raises:
        ShardError, StreamtrainError: for a configuration that cannot be planned.
    """
    try:
        return print_plan(arguments)
    except ShardError:
        raise
    except ValueError as error:
        raise StreamtrainError(str(error)) from None


def print_plan(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.micro_batch:
        overrides.append(f"data.micro_batch={arguments.micro_batch}")
    config = with_teacher_model(load_config(arguments.config, overrides, arguments.ranks))
    if config.model.factory is not None:
        print("model.factory: counts the parameters of your network, but activations and FLOPs of the built-in one\n")
    machine = machine_of(arguments, config)
    chosen: list[str] = []
    if arguments.fit:
        fitted = fit(config, machine, arguments.micro_batch)
        if fitted is None:
            logger.error("no setting fits; use more GPUs, more memory or a smaller model")
            return 1
        config, planned, estimate, chosen = fitted
    else:
        planned = machine.plan(config)
        estimate = machine.estimate_step(config, planned)
    is_fitting = machine.fits(planned)

    print(summary(planned, estimate, config, machine))
    if arguments.device is None and arguments.gpu_memory is None and machine.on_gpu and not has_gpu_driver():
        print("this machine has no GPU; --device cpu plans for its CPU instead")
    single: list[Remedy] = []
    if chosen:
        print("the fastest settings that fit:\n  " + " ".join(chosen))
    elif not is_fitting:
        single = remedies(config, machine)
        # more GPUs may be out of reach, so several changes are searched as well if no single setting is enough
        is_enough = any(not remedy.change.startswith("--") for remedy in single)
        together = None if is_enough else fit(config, machine, arguments.micro_batch)
        print(advice(single, together and together.overrides))
    if arguments.verbose:
        print("\n" + table(planned, machine.ranks))
    if arguments.json:
        print(json.dumps(plan_document(planned, estimate, config, machine, chosen, single)))
    return 0 if is_fitting else 1


def machine_of(arguments: argparse.Namespace, config: Config) -> Machine:
    """Return the machine that the options describe.

    Raises:
        StreamtrainError: for options that contradict each other.
    """
    engine = config.engine
    images = configured_images(config)
    on_gpu = arguments.device == "gpu" if arguments.device else engine.device != "cpu"
    if on_gpu:
        if arguments.gpu is not None and arguments.gpu_memory is None:
            arguments.gpu_memory = arguments.gpu.capacity
        if arguments.fit and arguments.gpu_memory is None:
            raise StreamtrainError("--fit needs --gpu, such as h100, or --gpu-memory, such as 80GB")
        gpu, bf16 = arguments.gpu or DEFAULT_GPU, engine.dtype != "fp32"
        if engine.fp8 and not gpu.fp8:
            raise StreamtrainError(
                f"engine.fp8 needs a GPU of compute capability 8.9 or newer; {gpu.name} has no FP8 matmuls: choose "
                "another --gpu, or engine.fp8=false"
            )
        hardware = Hardware(
            gpu, 1e9 / 8 * arguments.network if arguments.network else NETWORK_RATE,
            arguments.loader_rate or LOADER_RATE, bf16, 1e12 * arguments.tflops if arguments.tflops else None,
        )  # fmt: skip
        return Machine(
            arguments.ranks, bf16=bf16, gpu_memory=arguments.gpu_memory, host_memory=arguments.host_memory,
            hardware=hardware, images=images, cores=CORES_PER_GPU,
        )  # fmt: skip
    for option in ("gpu", "network", "loader_rate"):
        if getattr(arguments, option) is not None:
            raise StreamtrainError(f"--{option.replace('_', '-')} has no effect with --device cpu; remove it")
    if arguments.gpu_memory is not None:
        raise StreamtrainError("--gpu-memory has no effect with --device cpu; give --host-memory, or --device gpu")
    bf16 = uses_bf16(engine, cuda=False)
    memory = host_memory()
    cores = max(1, available_cores() // arguments.ranks)
    with_kernels = engine.cpu_kernels and has_kernels(bf16)
    return Machine(
        arguments.ranks, on_gpu=False, bf16=bf16, cores=cores, supported=CPU_KERNELS if with_kernels else "reference",
        host_memory=arguments.host_memory or (memory and memory.free), images=images,
        flops=1e12 * arguments.tflops if arguments.tflops else cores * core_flops(bf16, cpu_features(), with_kernels),
    )  # fmt: skip


def plan_document(
    planned: Plan, estimate: StepEstimate, config: Config, machine: Machine, chosen: list[str], single: list[Remedy]
) -> dict[str, Any]:
    seconds, time = estimate.seconds, estimate.by_operation
    images, _ = config.batch_split(machine.ranks)
    return {
        "fits": machine.fits(planned),
        "gpu_bytes": planned.gpu_bytes,
        "host_bytes": planned.host_bytes,
        "disk_bytes": planned.disk_bytes,
        "rank_bytes": planned.rank_bytes,
        "peak_phase": planned.peak_phase,
        "gpu_bytes_by_phase": {phase: planned.at(phase) for phase in PHASES},
        "state_bytes": planned.state_bytes,
        "num_backbone_parameters": planned.num_backbone_parameters,
        "num_parameters": planned.num_parameters,
        "flops_per_step": planned.flops_per_step,
        "assumed_flops_per_second": machine.attained_flops,
        "step_seconds": seconds,
        "run_seconds": seconds * config.run.steps,
        "gpu_hours": seconds * config.run.steps * machine.ranks / 3600 if machine.on_gpu else 0.0,
        "all_gather_bytes_per_step": planned.all_gather_bytes_per_step,
        "transfer_bytes_per_step": planned.transfer_bytes_per_step,
        "images_per_second": images / seconds,
        **(_time_document(time, config, machine) if time is not None else {}),
        "overrides": chosen,
        "changes": [remedy.change for remedy in single],
        "parts": [
            {"name": p.name, "place": p.location, "bytes": p.num_bytes, "when": list(p.when), "sum": p.arithmetic}
            for p in planned.parts
        ],
    }


def _time_document(time: StepTime, config: Config, machine: Machine) -> dict[str, Any]:
    """Return the keys about the time on a GPU; all times in seconds of one optimiser step."""
    return {
        "gpu": machine.hardware.gpu.option,
        "bound": time.bound,
        "time_parts": time.parts,
        "time_regions": [
            {"name": r.name, "phase": r.phase, "kernels": r.kernels, "host": r.host_seconds, **r.parts()}
            for r in time.regions
        ],
        "communication_seconds": time.communication,
        "offloading_seconds": time.offloading,
        "loader_seconds": time.loader,
        "mfu": mfu(config, machine.ranks, machine.hardware, time.seconds),
        "network_hidden_from_micro_batch": smallest_hiding_micro_batch(config, machine.ranks, machine.hardware),
    }


def _gpu(text: str) -> Gpu:
    try:
        return gpu_of_option(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
