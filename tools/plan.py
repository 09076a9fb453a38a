#!/usr/bin/env python3
"""What a run will take, before it starts and without a GPU.

python tools/plan.py --config giant.yaml --gpus 8 --gpu-memory 80GB [--host-memory 1TB] [--fit] [--json] [a.b=value ...]

Prints every buffer of a rank with its arithmetic, the peak and when it occurs, and whether it fits (exit status 1
if not). --fit looks for the fastest settings that fit and prints them as overrides. Sizes are decimal: 80GB is
80 000 000 000 bytes, a little less than a card of that name has; GiB counts in powers of two.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from streamtrain.config.load import load_config
from streamtrain.config.section import parse_bytes
from streamtrain.errors import StreamtrainError
from streamtrain.planning.fitting import fit, fits, step_seconds
from streamtrain.planning.memory import PHASES, Plan, plan
from streamtrain.planning.plan_text import gigabytes, table


def main() -> int:
    arguments = parse_arguments()
    try:
        return run(arguments)
    except (StreamtrainError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.micro_batch:
        overrides.append(f"data.micro_batch={arguments.micro_batch}")
    config = load_config(arguments.config, overrides)
    gpu_memory, host_memory = arguments.gpu_memory, arguments.host_memory
    chosen: list[str] = []
    if arguments.fit:
        found = fit(config, arguments.gpus, gpu_memory, host_memory, arguments.micro_batch)
        if found is None:
            print("error: no setting fits; give more GPUs, more memory or a smaller model", file=sys.stderr)
            return 1
        config, planned, chosen = found
    else:
        planned = plan(config, arguments.gpus)
    fitting = fits(planned, gpu_memory, host_memory)

    print(table(planned, arguments.gpus))
    seconds = step_seconds(config, arguments.gpus, planned)
    print(f"\na step takes roughly {seconds:,.1f} s on GPUs that do 400 TFLOP/s")
    if chosen:
        print("the fastest settings that fit:\n  " + " ".join(chosen))
    else:
        print(verdict("GPU", planned.gpu_bytes, gpu_memory))
        if host_memory is not None:
            print(verdict(f"host of {planned.ranks_per_host} rank(s)", planned.host_bytes, host_memory))
        if not fitting:
            print("--fit looks for settings that do")
    if arguments.json:
        print(json.dumps(document(planned, fitting, chosen)))
    return 0 if fitting else 1


def verdict(what: str, needed: int, given: int) -> str:
    """One line: whether it fits, and by how much."""
    relation = "fits" if needed <= given else "does NOT fit"
    return f"{what}: {gigabytes(needed)} of {gigabytes(given)} GB, {relation} ({gigabytes(given - needed)} GB to spare)"


def document(planned: Plan, fitting: bool, chosen: list[str]) -> dict[str, Any]:
    """What programs read."""
    return {
        "fits": fitting,
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, as for training")
    parser.add_argument("--gpus", type=int, required=True, help="ranks, one a GPU")
    parser.add_argument("--gpu-memory", type=size, required=True, metavar="SIZE", help="of one GPU, such as 80GB")
    parser.add_argument("--host-memory", type=size, metavar="SIZE", help="of one host; not checked if not given")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="samples of a micro-batch, as data.micro_batch")
    parser.add_argument("--fit", action="store_true", help="look for the fastest settings that fit")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for training")
    arguments = parser.parse_intermixed_args()
    if arguments.gpus < 1:
        parser.error("--gpus must be at least 1")
    return arguments


def size(text: str) -> int:
    """As ``parse_bytes``, for the command line."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} (got {text!r})") from None


if __name__ == "__main__":
    sys.exit(main())
