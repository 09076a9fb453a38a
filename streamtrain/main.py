"""Train: ``deepspeed streamtrain/main.py --config vits16.yaml data.shards=SET run.dir=RUN [a.b=value ...]``."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

# A launcher that starts this file by its path puts streamtrain/ itself first on sys.path: put the checkout there.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from shards.errors import ShardError
from shards.reading.mixture import AnySet
from streamtrain.config.load import load_config, open_shard_set
from streamtrain.config.tree import Config
from streamtrain.data.stream import build_order, check_cache, check_cache_folder, check_state, stream_identity
from streamtrain.engine.runtime import Launch, choose_accelerator
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.held_out import held_out
from streamtrain.reporting.trackers import check_trackers
from streamtrain.run.directory import (
    check_weights,
    completion_message,
    make_run_dir,
    run_lock,
    saved_state,
    starting_checkpoint,
)
from streamtrain.run.logs import configure_logging
from streamtrain.run.resume_policy import FLAG, check_resume

EXIT_USAGE = 2
OTHER_RANKS_WAIT_SECONDS = 10.0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Train a self-supervised vision transformer from a stream of image shards.",
        epilog="Start it with deepspeed (one rank a GPU), torchrun, or plain python for one rank. Starting the same "
        "command again goes on from the run folder's newest checkpoint. Example: deepspeed streamtrain/main.py "
        "--config vits16.yaml data.shards=my_set run.dir=runs/first run.steps=20000",
    )
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="start from another run's newest checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="check the configuration and the data, draw one panel of crops into the run folder, and exit",
    )
    parser.add_argument(
        FLAG, action="store_true",
        help="go on with a run whose settings, code, libraries or images have changed; without it, that is refused",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="keys that replace the file's")
    # DeepSpeed's launcher adds it; the rank is read from the environment
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    # overrides may stand before, between and after the options
    return parser.parse_intermixed_args()


def check(config: Config, launch: Launch, source: Path | None, accept_changes: bool) -> AnySet:
    """What can be told before any library is loaded and any rank waits for another; returns the set to train on.

    The run folder comes last, so that a start that is refused makes none.
    """
    config.batch_split(launch.world_size)
    config.objective.koleo.samples(config.data.micro_batch, launch.world_size)
    check_weights(config, source)
    check_trackers(config.monitor)
    shard_set = open_shard_set(config)
    if config.evaluation.every:
        held_out(config, shard_set)
    saved = saved_state(source) if source is not None else None
    order = build_order(config, shard_set, launch.world_size, saved["data"]["lane_block"] if saved else None)
    check_cache(config, shard_set, order, launch.rank, launch.world_size, launch.local_world_size)
    accepted = []
    if source is not None and saved is not None:
        accepted = check_resume(config, source, saved, launch.world_size, accept_changes)
        accepted += check_state(saved["data"], stream_identity(shard_set, order), accept_changes)
    make_run_dir(Path(config.run.dir), launch.rank)
    check_cache_folder(config)
    if accepted and launch.rank == 0:
        print(f"going on with changes: {'; '.join(accepted)}", flush=True)
    return shard_set


def main() -> int:
    """Exit status: 0 done, 75 or 130 stopped early and saved, 2 something to put right."""
    arguments = parse()
    launch = Launch.from_environment()
    configure_logging(launch.rank, launch.world_size)
    try:
        config = load_config(arguments.config, arguments.overrides, launch.world_size)
        run_dir = Path(config.run.dir)
        source = starting_checkpoint(run_dir, arguments.resume)
        complete = completion_message(config, source)
        if complete and not arguments.dry_run:
            if launch.rank == 0:
                print(complete, flush=True)
            return 0
        shard_set = check(config, launch, source, arguments.accept_changes)
        with run_lock(run_dir, launch.rank):
            choose_accelerator(config.engine, launch)
            from streamtrain.training.loop import dry_run, train  # torch and DeepSpeed take seconds to load

            if arguments.dry_run:
                return dry_run(config, shard_set) if launch.rank == 0 else 0
            return train(config, launch, shard_set, arguments.resume, arguments.accept_changes)
    except (StreamtrainError, ShardError) as error:
        # Most faults are found by all ranks alike. Rank 0 tells them at once, and the launcher then ends the others,
        # who wait for that; one that is still there after a while has a fault of its own to tell.
        if launch.rank > 0:
            time.sleep(OTHER_RANKS_WAIT_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # a rank that failed leaves at once: its threads and the process group would wait for the other ranks
    os._exit(status) if status else sys.exit(0)
