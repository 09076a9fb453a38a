#!/usr/bin/env python3
"""Measurements: prints a readable table and, with --json, one flat JSON object as its last line.

python tools/bench.py loader --set SET [--batch 32] [--batches 40] [--compare webdataset] [--json] [a.b=value ...]
python tools/bench.py order --samples 1.7e9 --shard-samples 10000 --world 256 --at 0.5 [--json] [a.b=value ...]
python tools/bench.py stream --set SET --samples 50000 [--loader] [--json] [a.b=value ...]
python tools/bench.py prototypes --rows 2048 --prototypes 262144 --dim 256 [--json] [a.b=value ...]
python tools/bench.py checkpoint --config vitl16.yaml --ranks 2 [--steps 4] [--scratch DIR] [--json] data.shards=SET
python tools/bench.py step --config vits16.yaml [--batch 16] [--steps 6] [--data SET] [--compile] [--compare plain]
    [--json]
python tools/bench.py memory --config vits16.yaml --ranks 2 [--steps 3] [--json] engine.dtype=bf16 data.shards=SET

Settings come from the default configuration and the overrides.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards.errors import ShardError
from streamtrain.config.load import build, load_config, merge, parse_override
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError

LEAST_BATCHES = 40


def main() -> int:
    arguments = parse_arguments()
    try:
        result = arguments.run(arguments)
    except (StreamtrainError, ShardError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, value in result.items():
        print(f"{key:32} {value:,.6g}" if isinstance(value, float) else f"{key:32} {value}")
    if arguments.json:
        print(json.dumps(result))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = parser.add_subparsers(dest="subject", required=True)
    add_loader(subjects)
    add_order(subjects)
    add_stream(subjects)
    add_prototypes(subjects)
    add_memory(subjects)
    add_checkpoint(subjects)
    add_step(subjects)
    return parser.parse_args()


def add_subject(subjects: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    """A subcommand with what all of them share."""
    parser: argparse.ArgumentParser = subjects.add_parser(name, help=help_text)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for training")
    parser.set_defaults(run=run)
    return parser


def add_loader(subjects: Any) -> None:
    parser = add_subject(subjects, "loader", run_loader, "images a second, CPU time, memory and waiting of the loader")
    parser.add_argument("--set", type=Path, required=True, help="shard set")
    parser.add_argument("--batch", type=int, default=32, help="samples a batch")
    parser.add_argument("--batches", type=int, default=LEAST_BATCHES, help=f"batches, at least {LEAST_BATCHES}")
    parser.add_argument("--compare", choices=("webdataset",), help="the same views by webdataset and Pillow")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="how long the consumer works on a batch")
    parser.add_argument("--device", default="cpu", help="where the batches go: cpu or cuda")


def run_loader(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import loader

    if arguments.batches < LEAST_BATCHES:
        raise StreamtrainError(f"--batches {arguments.batches} is too few to measure; give at least {LEAST_BATCHES}")
    overrides = [f"data.shards={arguments.set}", f"data.micro_batch={arguments.batch}", *arguments.overrides]
    return loader.run(
        configured(overrides), arguments.batches, arguments.step_seconds, arguments.device, bool(arguments.compare)
    )


def add_order(subjects: Any) -> None:
    parser = add_subject(subjects, "order", run_order, "time and memory to the first slot in the middle of an epoch")
    parser.add_argument("--samples", type=float, required=True, help="samples in all, such as 1.7e9")
    parser.add_argument("--shard-samples", type=int, default=10_000, help="samples a shard")
    parser.add_argument("--world", type=int, default=256, help="ranks")
    parser.add_argument("--at", type=float, default=0.5, help="where to resume, in epochs")


def run_order(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import order

    data = configured(arguments.overrides).data
    return order.run(
        int(arguments.samples), arguments.shard_samples, arguments.world, arguments.at,
        data.micro_batch, data.window, data.lanes,
    )  # fmt: skip


def add_stream(subjects: Any) -> None:
    parser = add_subject(subjects, "stream", run_stream, "resident memory of a long stream, and whether it grows")
    parser.add_argument("--set", type=Path, required=True, help="shard set")
    parser.add_argument("--samples", type=int, default=50_000, help="over which the slope is taken, after a warm-up")
    parser.add_argument("--loader", action="store_true", help="decode and augment too, rather than read alone")


def run_stream(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import stream

    overrides = [f"data.shards={arguments.set}", *arguments.overrides]
    return stream.run(configured(overrides), arguments.samples, arguments.loader)


def add_prototypes(subjects: Any) -> None:
    help_text = "peak and time of the fused prototype loss and of the plain one"
    parser = add_subject(subjects, "prototypes", run_prototypes, help_text)
    parser.add_argument("--rows", type=int, default=2048, help="rows of student and of teacher")
    parser.add_argument("--prototypes", type=int, default=65_536, help="prototypes")
    parser.add_argument("--dim", type=int, default=256, help="bottleneck")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each; the best counts")


def run_prototypes(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import prototypes

    chunk_bytes = configured(arguments.overrides).objective.chunk_bytes
    return prototypes.run(arguments.rows, arguments.prototypes, arguments.dim, chunk_bytes, arguments.rounds)


def add_memory(subjects: Any) -> None:
    parser = add_subject(subjects, "memory", run_memory, "planned and measured peak of a rank over a few steps")
    parser.add_argument("--config", required=True, help="recipe, as for training")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps")


def run_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import memory

    return memory.run(load_config(arguments.config, arguments.overrides), arguments.ranks, arguments.steps)


def add_checkpoint(subjects: Any) -> None:
    parser = add_subject(subjects, "checkpoint", run_checkpoint, "how long a checkpoint holds up training")
    parser.add_argument("--config", required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="before the save, and after it")
    parser.add_argument("--scratch", type=Path, help="a folder on the disk that is to be measured")


def run_checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import checkpoint

    config = load_config(arguments.config, arguments.overrides)
    return checkpoint.run(config, arguments.ranks, arguments.steps, arguments.scratch)


def add_step(subjects: Any) -> None:
    parser = add_subject(subjects, "step", run_step, "images a second, memory and shares of time of the whole step")
    parser.add_argument("--config", required=True, help="recipe, as for training")
    parser.add_argument("--batch", type=int, help="samples a micro-batch, of which a step has one")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps that are timed")
    parser.add_argument("--data", default="synthetic", help="a shard set, or synthetic: noise that is there already")
    parser.add_argument("--ranks", type=int, default=1, help="ranks on this machine")
    parser.add_argument("--compile", action="store_true", help="compiled blocks on a CPU too: engine.compile=on")
    parser.add_argument("--compare", choices=("plain",), help="the same step in plain PyTorch, one process")


def run_step(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import step

    shards = "''" if arguments.data == "synthetic" else arguments.data
    overrides = [f"data.shards={shards}", *(["engine.compile=on"] if arguments.compile else []), *arguments.overrides]
    if arguments.batch:
        overrides = [f"data.micro_batch={arguments.batch}", "data.global_batch=null", *overrides]
    config = load_config(arguments.config, overrides)
    return step.run(config, arguments.steps, arguments.ranks, bool(arguments.compare))


def configured(overrides: list[str]) -> Config:
    """The default configuration with ``a.b=value`` overrides."""
    raw: dict[str, Any] = {}
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return build(raw)


if __name__ == "__main__":
    sys.exit(main())
