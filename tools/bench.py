#!/usr/bin/env python3
"""Developers' benchmarks: print a table and, with --json, one flat JSON object as the last line.

python tools/bench.py loader --set SET [--batch 32] [--batches 40] [--compare webdataset] [a.b=value ...]
python tools/bench.py decoder [--device cuda]
python tools/bench.py step --config vits16.yaml [--batch 16] [--steps 6] [--data SET] [--compile] [--compare plain]
python tools/bench.py profile --config vitl16.yaml [--batch 32] [--steps 2] [--data SET]
python tools/bench.py memory --config vits16.yaml --ranks 2 [--steps 3] engine.dtype=bf16 data.shards=SET
python tools/bench.py checkpoint --config vitl16.yaml --ranks 2 [--steps 4] [--scratch DIR] data.shards=SET
python tools/bench.py prototypes --rows 2048 --prototypes 262144 --dim 256
python tools/bench.py order --samples 1.7e9 --shard-samples 10000 --world 256 --at 0.5
python tools/bench.py stream --set SET --samples 50000 [--loader]
python tools/bench.py operations [--write]
python tools/bench.py predicted
python tools/bench.py continue --folder DIR --images DIR|TAR [--seeds 3] [--steps 400] [a.b=value ...]
python tools/bench.py accuracy --folder DIR --images DIR|TAR [--config cifar10.yaml] [--seeds 3] [a.b=value ...]
python tools/bench.py health --folder DIR --images DIR|TAR [--runs 30] [--first-seed 100] [--faults NAME ...]
python tools/bench.py reference --run RUN --images "2,400 drawn images" [--recipe NAME.yaml] [--out FILE]

All take --json, --repeats N (report the median of N runs), --save FILE (write the result with command, commit,
versions and hardware, for benchmarks/results/) and settings as a.b=value.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from streamtrain.run import interrupts

if __name__ == "__main__":
    # before the slow imports
    interrupts.end_quietly_on_interrupt()
    interrupts.raise_on_interrupt()

import argparse
import json
from collections.abc import Callable
from typing import Any

from benchmarks.results import median_result, save_result
from shards.errors import ShardError
from streamtrain.config.load import build_for_set, load_config, merge, parse_override
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.run.command_line import CommandParser, local_path
from streamtrain.run.gpu_allocator import set_allocator_defaults
from streamtrain.run.signals import EXIT_INTERRUPTED

MIN_BATCHES = 40


def main() -> int:
    arguments = parse_arguments()
    # as for training
    set_allocator_defaults()
    try:
        runs = [arguments.run(arguments) for _ in range(arguments.repeats)]
    except KeyboardInterrupt:
        interrupts.report()
        return EXIT_INTERRUPTED
    except (StreamtrainError, ShardError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = median_result(runs)
    for key, value in result.items():
        print(f"{key:32} {value:,.6g}" if isinstance(value, float) else f"{key:32} {value}")
    if arguments.save is not None:
        save_result(arguments.save, arguments.benchmark, sys.argv[1:], runs)
    if arguments.json:
        print(json.dumps(result))
    return 1 if result.get("failures") else 0


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], dict[str, Any]], help_text: str) -> Any:
        """Add a subcommand with the common options; return its ``add_argument``."""
        command = benchmarks.add_parser(name, help=help_text)
        command.add_argument("--json", action="store_true", help="print one JSON object last")
        command.add_argument("--repeats", type=_parse_count, default=1, help="runs; the median is reported")
        command.add_argument("--save", type=local_path, metavar="FILE", help="result file to write, JSON")
        command.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings, as for training")
        command.set_defaults(run=run)
        return command.add_argument

    add_option = add("loader", run_loader, "throughput, CPU time, memory and waiting of the loader")
    add_option("--set", type=local_path, required=True, help="shard set")
    add_option("--batch", type=int, default=32, help="samples per batch")
    add_option("--batches", type=int, default=MIN_BATCHES, help=f"batches, at least {MIN_BATCHES}")
    add_option("--compare", choices=("webdataset",), help="also measure the same views by webdataset and Pillow")
    add_option("--step-seconds", type=float, default=0.0, help="time the consumer spends on each batch")
    add_option("--device", default="cpu", help="device of the batches: cpu or cuda")

    add_option = add("decoder", run_decoder, "odd and corrupt images: pixels of a device against the CPU, quarantine")
    add_option("--device", default="cpu", help="device of the loader: cpu or cuda")

    add_option = add("step", run_step, "throughput, memory and phases of the whole training step")
    add_option("--config", required=True, help="recipe, as for training")
    add_option("--batch", type=int, help="samples per micro-batch; each step then has one micro-batch")
    add_option("--steps", type=int, default=6, help="timed optimiser steps")
    add_option("--data", default="synthetic", help="a shard set, or synthetic: a fixed batch of noise")
    add_option("--ranks", type=int, default=1, help="ranks on this machine")
    add_option("--compile", action="store_true", help="compile blocks on a CPU too: engine.compile=on")
    add_option("--compare", choices=("plain",), help="also measure the same step in plain PyTorch, one process")

    add_option = add("profile", run_profile, "the kernels of the training step that take most time")
    add_option("--config", required=True, help="recipe, as for training")
    add_option("--batch", type=int, help="samples per micro-batch; each step then has one micro-batch")
    add_option("--steps", type=int, default=2, help="profiled optimiser steps")
    add_option("--data", default="synthetic", help="a shard set, or synthetic: a fixed batch of noise")

    add_option = add("memory", run_memory, "planned and measured peak memory of a rank over a few steps")
    add_option("--config", required=True, help="recipe, as for training")
    add_option("--ranks", type=int, default=1, help="ranks on this machine")
    add_option("--steps", type=int, default=3, help="optimiser steps")

    add_option = add("checkpoint", run_checkpoint, "time that training waits for a checkpoint")
    add_option("--config", required=True, help="recipe, as for training")
    add_option("--ranks", type=int, default=1, help="ranks on this machine")
    add_option("--steps", type=int, default=4, help="optimiser steps before the save, and after it")
    add_option("--scratch", type=local_path, help="folder on the disk to measure")

    add_option = add("prototypes", run_prototypes, "peak memory and time of the fused and the plain prototype loss")
    add_option("--rows", type=int, default=2048, help="rows of student and of teacher")
    add_option("--prototypes", type=int, default=65_536, help="prototypes")
    add_option("--dim", type=int, default=256, help="bottleneck dimension")
    add_option("--rounds", type=int, default=1, help="interleaved measurements of each form; the best counts")

    add_option = add("order", run_order, "time and memory to find the first slot in the middle of an epoch")
    add_option("--samples", type=float, required=True, help="total samples, such as 1.7e9")
    add_option("--shard-samples", type=int, default=10_000, help="samples per shard")
    add_option("--world", type=int, default=256, help="number of ranks")
    add_option("--at", type=float, default=0.5, help="position to resume at, in epochs")

    add_option = add("stream", run_stream, "resident memory of a long stream, and whether it grows")
    add_option("--set", type=local_path, required=True, help="shard set")
    add_option("--samples", type=int, default=50_000, help="samples to measure the slope over, after a warm-up")
    add_option("--loader", action="store_true", help="decode and augment too, instead of reading only")

    add_option = add("operations", run_operations, "kernels and bytes of a step on a GPU, counted without one")
    add_option("--write", action="store_true", help="write streamtrain/planning/operations.json")
    add("predicted", run_predicted, "predicted time of recipes and published runs on GPUs, as Markdown tables")

    add_option = add("continue", run_continue, "kNN kept on drawn images and gained on others by continued training")
    add_option(
        "--folder", type=local_path, required=True, help="folder for sets and runs; existing ones are used again"
    )
    add_option(
        "--images", type=local_path, required=True, help="the new images: class folders train and test, or a tar"
    )
    add_option("--seeds", type=_parse_count, default=3, help="continued runs of each kind")
    add_option("--base-steps", type=_parse_count, default=2000, help="steps of the first training")
    add_option("--steps", type=_parse_count, default=400, help="steps of the continued runs")

    add_option = add("accuracy", run_accuracy, "kNN and a linear layer after training a recipe with several seeds")
    add_option(
        "--folder", type=local_path, required=True, help="folder for sets and runs; finished runs are used again"
    )
    add_option("--images", type=local_path, required=True, help="class folders in train and test, or a tar of them")
    add_option("--config", default="cifar10.yaml", help="recipe, as for training")
    add_option("--seeds", type=_parse_count, default=3, help="number of runs")

    add_option = add("health", run_health, "verdicts on runs with and without faults: the confusion matrix")
    add_option(
        "--folder", type=local_path, required=True, help="folder for sets and runs; existing ones are used again"
    )
    add_option("--images", type=local_path, required=True, help="photographs: class folders, or a tar with train")
    add_option("--runs", type=_parse_count, default=30, help="number of runs; the faults take turns")
    add_option("--first-seed", type=_parse_count, default=100, help="seed of the first run; the others count up")
    add_option("--steps", type=_parse_count, default=40, help="steps of each run")
    add_option("--faults", nargs="+", default=(), metavar="FAULT", help="faults, by name (default: all)")

    add_option = add("reference", run_reference, "store the curves of a healthy run, for reports of later runs")
    add_option("--run", dest="run_dir", type=local_path, required=True, help="completed run directory")
    add_option("--images", required=True, help="words for its images, shown in reports")
    add_option("--recipe", help="shipped recipe of the run (default: the closest one)")
    add_option("--out", type=local_path, help="file to write (default: in the package, by recipe)")
    return parser.parse_args()


def run_loader(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import loader_throughput

    if arguments.batches < MIN_BATCHES:
        raise StreamtrainError(f"--batches {arguments.batches} is too few to measure; give at least {MIN_BATCHES}")
    overrides = [f"data.shards={arguments.set}", f"data.micro_batch={arguments.batch}", *arguments.overrides]
    return loader_throughput.run(
        _build_config(overrides), arguments.batches, arguments.step_seconds, arguments.device, bool(arguments.compare)
    )


def run_decoder(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import decoder_agreement

    return decoder_agreement.run(arguments.device)


def run_step(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import training_step

    config = _step_config(arguments, ["engine.compile=on"] if arguments.compile else [])
    return training_step.run(config, arguments.steps, arguments.ranks, bool(arguments.compare))


def run_profile(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import step_profile

    return step_profile.run(_step_config(arguments, []), arguments.steps)


def _step_config(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    shards = "''" if arguments.data == "synthetic" else arguments.data
    overrides = [f"data.shards={shards}", *overrides, *arguments.overrides]
    if arguments.batch:
        overrides = [f"data.micro_batch={arguments.batch}", "data.global_batch=null", *overrides]
    return load_config(arguments.config, overrides)


def run_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import training_memory

    return training_memory.run(load_config(arguments.config, arguments.overrides), arguments.ranks, arguments.steps)


def run_checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import checkpoint_stall

    config = load_config(arguments.config, arguments.overrides)
    return checkpoint_stall.run(config, arguments.ranks, arguments.steps, arguments.scratch)


def run_prototypes(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import prototype_loss

    chunk_bytes = _build_config(arguments.overrides).objective.chunk_size(on_gpu=False)
    return prototype_loss.run(arguments.rows, arguments.prototypes, arguments.dim, chunk_bytes, arguments.rounds)


def run_order(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import order_lookup

    data = _build_config(arguments.overrides).data
    return order_lookup.run(
        int(arguments.samples), arguments.shard_samples, arguments.world, arguments.at,
        data.micro_batch, data.window, data.lanes,
    )  # fmt: skip


def run_stream(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import stream_memory

    overrides = [f"data.shards={arguments.set}", *arguments.overrides]
    return stream_memory.run(_build_config(overrides), arguments.samples, arguments.loader)


def run_operations(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import operations

    return operations.run(arguments.write)


def run_predicted(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import predicted_time

    return predicted_time.run()


def run_continue(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import continue_training

    return continue_training.run(
        arguments.images, arguments.folder, arguments.seeds, arguments.base_steps, arguments.steps, arguments.overrides
    )


def run_accuracy(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import recipe_accuracy

    return recipe_accuracy.run(
        arguments.config, arguments.images, arguments.folder, arguments.seeds, arguments.overrides
    )


def run_health(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import run_health

    return run_health.run(
        arguments.images, arguments.folder, arguments.runs, arguments.first_seed, arguments.steps, arguments.overrides,
        arguments.faults,
    )  # fmt: skip


def run_reference(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks import reference_run

    return reference_run.run(arguments.run_dir, arguments.images, arguments.recipe, arguments.out)


def _build_config(overrides: list[str]) -> Config:
    raw: dict[str, Any] = {}
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return build_for_set(raw)


def _parse_count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


if __name__ == "__main__":
    sys.exit(main())
