"""``streamtrain plan``: estimate memory and time of a run, without a GPU."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from streamtrain.cli.arguments import add_command, byte_size, positive_int
from streamtrain.config.load import load_config
from streamtrain.errors import StreamtrainError
from streamtrain.planning.fitting import fit, fits, step_seconds
from streamtrain.planning.memory import PHASES, Plan, plan
from streamtrain.planning.plan_text import gigabytes, table

_SUMMARY = "Estimate the memory and the time of a run, without a GPU."
_DETAILS = """\
Prints every buffer of a rank with its arithmetic, the peak and the phase in which it occurs, and
whether it fits; exit status 1 means that it does not fit. --fit searches for the fastest settings
that fit and prints them as overrides. Sizes are decimal: 80GB is 80 000 000 000 bytes, slightly less
than a card of that name has; GiB is binary.
"""
_EXAMPLES = """\
  streamtrain plan --config giant.yaml --gpus 8 --gpu-memory 80GB
  streamtrain plan --config giant.yaml --gpus 1 --gpu-memory 141GB --host-memory 128GB --fit
  streamtrain plan --config vitl16.yaml --gpus 4 --gpu-memory 24GB --json data.micro_batch=16
"""

logger = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "plan", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("--config", required=True, help="recipe, as for training")
    parser.add_argument("--gpus", type=positive_int, required=True, help="number of ranks, one per GPU")
    parser.add_argument("--gpu-memory", type=byte_size, required=True, metavar="SIZE", help="of one GPU, such as 80GB")
    parser.add_argument("--host-memory", type=byte_size, metavar="SIZE", help="of one host (default: not checked)")
    parser.add_argument(
        "--micro-batch", type=positive_int, metavar="N", help="samples per micro-batch: data.micro_batch"
    )
    parser.add_argument("--fit", action="store_true", help="search for the fastest settings that fit")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for training")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan of a run.

    Raises:
        StreamtrainError: for a configuration that cannot be planned.
    """
    try:
        return print_plan(arguments)
    except ValueError as error:
        raise StreamtrainError(str(error)) from None


def print_plan(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.micro_batch:
        overrides.append(f"data.micro_batch={arguments.micro_batch}")
    config = load_config(arguments.config, overrides)
    if config.model.factory is not None:
        print("model.factory: parameters of your network; activations and FLOPs as of the built-in one\n")
    gpu_memory, host_memory = arguments.gpu_memory, arguments.host_memory
    chosen: list[str] = []
    if arguments.fit:
        fitted = fit(config, arguments.gpus, gpu_memory, host_memory, arguments.micro_batch)
        if fitted is None:
            logger.error("no setting fits; use more GPUs, more memory or a smaller model")
            return 1
        config, planned, chosen = fitted
    else:
        planned = plan(config, arguments.gpus)
    is_fitting = fits(planned, gpu_memory, host_memory)

    print(table(planned, arguments.gpus))
    seconds = step_seconds(config, arguments.gpus, planned)
    print(f"\na step takes roughly {seconds:,.1f} s on GPUs with 400 TFLOP/s")
    if chosen:
        print("the fastest settings that fit:\n  " + " ".join(chosen))
    else:
        print(verdict("GPU", planned.gpu_bytes, gpu_memory))
        if host_memory is not None:
            print(verdict(f"host of {planned.ranks_per_host} rank(s)", planned.host_bytes, host_memory))
        if not is_fitting:
            print("--fit searches for settings that fit")
    if arguments.json:
        print(json.dumps(plan_document(planned, is_fitting, chosen)))
    return 0 if is_fitting else 1


def verdict(what: str, needed: int, available: int) -> str:
    relation = "fits" if needed <= available else "does NOT fit"
    spare = gigabytes(available - needed)
    return f"{what}: {gigabytes(needed)} of {gigabytes(available)} GB, {relation} ({spare} GB to spare)"


def plan_document(planned: Plan, is_fitting: bool, chosen: list[str]) -> dict[str, Any]:
    return {
        "fits": is_fitting,
        "gpu_bytes": planned.gpu_bytes,
        "host_bytes": planned.host_bytes,
        "disk_bytes": planned.disk_bytes,
        "peak_phase": planned.peak_phase,
        "gpu_bytes_by_phase": {phase: planned.at(phase) for phase in PHASES},
        "state_bytes": planned.state_bytes,
        "num_parameters": planned.num_parameters,
        "flops_per_step": planned.flops_per_step,
        "all_gather_bytes_per_step": planned.all_gather_bytes_per_step,
        "transfer_bytes_per_step": planned.transfer_bytes_per_step,
        "overrides": chosen,
        "parts": [
            {"name": p.name, "place": p.location, "bytes": p.num_bytes, "when": list(p.when), "sum": p.arithmetic}
            for p in planned.parts
        ],
    }
