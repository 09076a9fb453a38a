"""The options that select a backbone, the same in every command."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shards.format.pixels import RGB, PixelFormat
from streamtrain.config.load import load_config, read_resolved
from streamtrain.errors import StreamtrainError
from streamtrain.run.command_line import local_path

if TYPE_CHECKING:
    from streamtrain.interop.load import Backbone

BEST = "best"


def add_backbone_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=local_path, help="run directory; the latest checkpoint unless --step is given")
    parser.add_argument("--step", type=parse_step, help="with --run: step of the checkpoint, or `best`")
    parser.add_argument("--student", action="store_true", help="with --run: the student instead of the teacher")
    parser.add_argument(
        "--weights", type=local_path, help="folder of an export, of transformers or of timm, or a .safetensors file"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="with --run or --config: the newly initialised network"
    )
    parser.add_argument("--config", help="with --untrained: a recipe, as for training")
    parser.add_argument(
        "--factory", metavar="MODULE:CLASS",
        help="the class of the network, if it was trained with model.factory; its code is executed",
    )  # fmt: skip


def load_selected_backbone(arguments: argparse.Namespace) -> Backbone:
    """Load the backbone that the options select.

    Raises:
        StreamtrainError: if the options do not select exactly one.
    """
    # torch takes seconds to load
    from streamtrain.interop.load import load_run, load_untrained, load_untrained_run, load_weights

    factory: str | None = arguments.factory

    if arguments.untrained:
        if (arguments.run is None) == (arguments.config is None):
            raise StreamtrainError("--untrained needs either --run or --config")
        if arguments.run:
            return load_untrained_run(arguments.run, factory)
        if factory is not None:
            raise StreamtrainError("--factory belongs to --run or --weights; a recipe has model.factory")
        return load_untrained(load_config(arguments.config))
    if arguments.config:
        raise StreamtrainError("--config requires --untrained; a trained network comes from --run or --weights")
    if (arguments.run is None) == (arguments.weights is None):
        raise StreamtrainError("select the network: give one of --run RUN, --weights W, or --untrained")
    if arguments.weights:
        if arguments.step is not None or arguments.student:
            raise StreamtrainError("--step and --student select a checkpoint of --run; --weights has none")
        return load_weights(arguments.weights, factory)
    return load_run(arguments.run, arguments.step, "student" if arguments.student else "teacher", factory)


def selected_pixels(arguments: argparse.Namespace) -> PixelFormat:
    """Return the channels and the dtype of the images of the selected backbone, without loading it.

    They are those of 8-bit RGB if the options select none; loading reports that.
    """
    # torch takes seconds to load
    from streamtrain.interop.load import read_weights_config

    if arguments.run:
        return read_resolved(arguments.run).data.pixels
    if arguments.config:
        return load_config(arguments.config).data.pixels
    if arguments.weights:
        return read_weights_config(arguments.weights, arguments.factory).pixels
    return RGB


def describe_backbone(arguments: argparse.Namespace) -> str:
    """Return the kind of the selected network: untrained, weights, student or teacher."""
    if arguments.untrained:
        return "untrained"
    return "weights" if arguments.weights else "student" if arguments.student else "teacher"


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")


def choose_device(name: str) -> str:
    """Return the device that ``--device`` selects.

    Raises:
        StreamtrainError: it is unknown, or this machine does not have it.
    """
    # torch takes seconds to load
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if num_gpus else "cpu"
    if name == "cpu":
        return name
    kind, separator, index = name.partition(":")
    if kind != "cuda" or (separator and not (index.isascii() and index.isdecimal())):
        raise StreamtrainError(f"device {name!r} is not one of auto, cpu, cuda and cuda:N")
    if int(index or 0) >= num_gpus:
        raise StreamtrainError(f"device {name} does not exist: torch finds {num_gpus} GPU(s); use cpu or auto")
    return name


def parse_step(text: str) -> int | str:
    """Parse a number of steps, or ``best``."""
    if text != BEST and not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor {BEST}")
    return text if text == BEST else int(text)
