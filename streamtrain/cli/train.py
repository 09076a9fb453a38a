"""``streamtrain train``: start the ranks of a training run."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from streamtrain.cli.arguments import add_command, positive_int
from streamtrain.cli.hosts import read_hostfile, run_on_hosts
from streamtrain.cli.launch import run_ranks
from streamtrain.config.load import load_config
from streamtrain.engine.runtime import count_gpus
from streamtrain.main import add_arguments, run_process
from streamtrain.run.command_line import local_path
from streamtrain.run.messages import typed_command
from streamtrain.run.resume_policy import separate_overrides
from streamtrain.run.signals import STOP_STATUSES

logger = logging.getLogger(__name__)

_SUMMARY = "Train a self-supervised vision transformer from a stream of image shards."
_DETAILS = """\
Starts one rank for each GPU of this machine, or one rank on the CPU. Re-run the same command to resume
from the latest checkpoint of the run directory. `touch RUN/STOP` or SIGTERM stops the run after
a checkpoint with exit status 75; Ctrl-C does the same with 130, and a second Ctrl-C ends it at once.

A rank that another launcher has started (deepspeed, torchrun, srun; RANK is set) runs as that rank.
"""
_EXAMPLES = """\
  streamtrain train --config vits16.yaml data.shards=sets/photos run.dir=runs/photos
  streamtrain train --gpus 2 --config vits16.yaml data.shards=sets/photos run.dir=runs/photos run.steps=20000
  streamtrain train --config my.yaml run.dir=runs/next --resume runs/first
  streamtrain train --hostfile hosts --config vitl16.yaml data.shards=s3://bucket/set run.dir=/shared/run
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "train", _SUMMARY, _DETAILS, _EXAMPLES)
    add_arguments(parser)
    parser.add_argument(
        "--gpus", "--ranks", dest="ranks", type=positive_int, metavar="N",
        help="number of ranks, one per GPU; on a machine without a GPU, processes on the CPU (default: all "
        "visible GPUs, otherwise 1; with --hostfile: the number of GPUs to use on each host)",
    )  # fmt: skip
    parser.add_argument(
        "--hostfile", type=local_path, metavar="F",
        help="train on several machines: a file with lines such as `node1 slots=8`; needs passwordless ssh and the "
        "same paths on each",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks, or run the only rank in this process.

    Raises:
        StreamtrainError: for a configuration or a hostfile that cannot be used.
    """
    separate_overrides(arguments)
    if "RANK" in os.environ:
        run_process(arguments)
    hosts, ranks = {}, arguments.ranks
    if arguments.hostfile is not None:
        hosts = read_hostfile(arguments.hostfile, arguments.ranks)
        ranks = sum(hosts.values())
    # report invalid settings once, before any rank loads a library
    engine = load_config(arguments.config, arguments.overrides, ranks or 1).engine
    command = typed_command(arguments.words)
    if hosts:
        status = run_on_hosts(rank_arguments(arguments), hosts, engine.environment)
    else:
        ranks = ranks or (1 if engine.device == "cpu" else max(1, count_gpus()))
        if ranks == 1:
            run_process(arguments, command)
        status = run_ranks(rank_arguments(arguments), ranks)
    if status in STOP_STATUSES:
        logger.info("  %s", command)
    return status


def rank_arguments(arguments: argparse.Namespace) -> list[str]:
    """Return the command line of ``main.py`` for parsed arguments."""
    words = [*arguments.overrides, "--config", arguments.config]
    if arguments.resume is not None:
        words += ["--resume", str(arguments.resume)]
    if arguments.dry_run:
        words.append("--dry-run")
    if arguments.accept:
        words += ["--accept", *arguments.accept]
    if arguments.accept_changes:
        words.append("--accept-changes")
    return words
