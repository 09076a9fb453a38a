"""``streamtrain train``: start the ranks of a training run."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from streamtrain.cli.arguments import add_command, positive_int
from streamtrain.cli.hosts import read_hostfile, run_on_hosts
from streamtrain.cli.launch import Share, check_ranks, received_signals, run_ranks, run_share
from streamtrain.config.load import load_config
from streamtrain.engine.runtime import count_gpus
from streamtrain.errors import StreamtrainError
from streamtrain.main import add_arguments, run_process
from streamtrain.run.command_line import local_path
from streamtrain.run.messages import typed_command
from streamtrain.run.resume_policy import separate_overrides
from streamtrain.run.signals import STOP_STATUSES

logger = logging.getLogger(__name__)

_SUMMARY = "Train a self-supervised vision transformer from a stream of image shards."
_DETAILS = """\
Starts one rank for each GPU of this machine, or one rank on the CPU. Re-run the same command to resume
from the latest checkpoint of the run directory.

`touch RUN/STOP` or SIGTERM saves a checkpoint and stops the run with exit status 75. Ctrl-C does the same
with exit status 130. A second Ctrl-C ends the run immediately, without a checkpoint.

If another launcher (deepspeed, torchrun, srun) has set RANK, the command runs only that rank. For several
machines, see docs/clusters.md. examples/ has jobs for Slurm and Kubernetes.
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
        help="number of ranks: GPUs, or processes on a machine without a GPU (default: all visible GPUs, otherwise 1). "
        "With --hostfile: number of ranks on each host",
    )  # fmt: skip
    parser.add_argument(
        "--hostfile", type=local_path, metavar="F",
        help="train on the machines in this file, with lines such as `node1 slots=8`; needs passwordless ssh, and the "
        "same paths on all machines",
    )  # fmt: skip

    parser.add_argument(
        "--nodes", type=positive_int, metavar="N",
        help="number of machines, for systems that start this command on each machine. All machines need the same "
        "--gpus; MASTER_ADDR and MASTER_PORT are the address and a free port of the first machine",
    )  # fmt: skip
    parser.add_argument(
        "--node-rank", type=int, metavar="K", help="with --nodes: number of this machine, from 0 to N - 1"
    )


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks, or run the only rank in this process.

    Raises:
        StreamtrainError: for a configuration, a hostfile or options that cannot be used.
    """
    separate_overrides(arguments)
    if "RANK" in os.environ:
        run_process(arguments)
    hosts, ranks, nodes = {}, arguments.ranks, arguments.nodes or 1
    check_ranks(ranks or 1)
    _check_node_options(arguments)
    if arguments.hostfile is not None:
        hosts = read_hostfile(arguments.hostfile, arguments.ranks)
        ranks = sum(hosts.values())
    # report invalid settings once, before any rank loads a library
    engine = load_config(arguments.config, arguments.overrides, (ranks or 1) * nodes).engine
    words, command = rank_arguments(arguments), typed_command(arguments.words)
    if hosts:
        status = run_on_hosts(words, hosts, engine.environment)
    else:
        ranks = ranks or (1 if engine.device == "cpu" else max(1, count_gpus()))
        if nodes > 1:
            address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            share = Share(arguments.node_rank * ranks, ranks, nodes * ranks, address, port)
            with received_signals() as received:
                status = run_share(words, share, received)
        elif ranks == 1:
            run_process(arguments, command)
        else:
            status = run_ranks(words, ranks)
    if status in STOP_STATUSES:
        logger.info("  %s", command)
    return status


def _check_node_options(arguments: argparse.Namespace) -> None:
    if arguments.nodes is None and arguments.node_rank is None:
        return
    if arguments.hostfile is not None:
        raise StreamtrainError("give --hostfile, which starts all machines, or --nodes and --node-rank, not both")
    if arguments.nodes is None or arguments.node_rank is None:
        raise StreamtrainError("give both --nodes, the number of machines, and --node-rank, the number of this one")
    if not 0 <= arguments.node_rank < arguments.nodes:
        raise StreamtrainError(f"--node-rank {arguments.node_rank} is not from 0 to {arguments.nodes - 1}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if arguments.nodes > 1 and missing:
        raise StreamtrainError(
            f"--nodes needs {' and '.join(missing)}: the address of the first machine, and a free port of it"
        )


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
