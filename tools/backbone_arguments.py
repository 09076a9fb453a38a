"""The arguments by which a tool is told which backbone to use, the same in all tools."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from streamtrain.checkpoint.retention import read_best
from streamtrain.config.load import load_config, read_resolved
from streamtrain.errors import StreamtrainError

if TYPE_CHECKING:
    from streamtrain.interop.load import Backbone

BEST = "best"


def add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, help="run folder; its newest checkpoint unless --step says another")
    parser.add_argument("--step", type=step, help="with --run: the checkpoint of this step, or best")
    parser.add_argument("--student", action="store_true", help="with --run: the student, not the teacher")
    parser.add_argument("--weights", type=Path, help="an exported folder (ours or transformers') or .safetensors")
    parser.add_argument(
        "--untrained", action="store_true", help="with --run or --config: the network as its seed makes it"
    )
    parser.add_argument("--config", help="with --untrained: a recipe, as for training")


def load_backbone(arguments: argparse.Namespace) -> Backbone:
    """The backbone the arguments name.

    Raises:
        StreamtrainError: if they name none, or two.
    """
    from streamtrain.interop.load import load_run, load_untrained, load_weights  # torch takes seconds to load

    if arguments.untrained:
        if (arguments.run is None) == (arguments.config is None):
            raise StreamtrainError("--untrained needs either --run or --config")
        return load_untrained(read_resolved(arguments.run) if arguments.run else load_config(arguments.config))
    if arguments.config:
        raise StreamtrainError("--config goes with --untrained only: a trained network comes from --run or --weights")
    if (arguments.run is None) == (arguments.weights is None):
        raise StreamtrainError("give the network: one of --run RUN, --weights W, or --untrained")
    if arguments.weights:
        if arguments.step is not None or arguments.student:
            raise StreamtrainError("--step and --student choose a checkpoint of --run; --weights has none")
        return load_weights(arguments.weights)
    return load_run(arguments.run, chosen_step(arguments), "student" if arguments.student else "teacher")


def step(text: str) -> int | str:
    """A number of steps, or ``best``."""
    if text != BEST and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor {BEST}")
    return text if text == BEST else int(text)


def chosen_step(arguments: argparse.Namespace) -> int | None:
    """``--step`` as a number; None: the newest.

    Raises:
        StreamtrainError: the run has no best checkpoint.
    """
    if arguments.step != BEST:
        return arguments.step
    best = read_best(arguments.run)
    if best is None:
        raise StreamtrainError(f"{arguments.run} has no best checkpoint: evaluation.best is null, or not measured")
    return int(best["step"])
