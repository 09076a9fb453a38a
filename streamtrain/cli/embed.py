"""``streamtrain embed``: write the features of many images to files."""

from __future__ import annotations

import argparse
import re
from typing import Any

from streamtrain.cli.arguments import add_command, positive_int, writing
from streamtrain.cli.backbone import add_backbone_arguments, add_device_argument
from streamtrain.errors import StreamtrainError
from streamtrain.run.command_line import local_path, path_or_url

FEATURES = ("cls", "mean", "patches")
FORMATS = ("npy", "parquet", "tar")
DTYPES = ("float32", "float16")
COMPUTE = ("float32", "bfloat16")

_SUMMARY = "Write the features of all images of a set, folder, list or archive."
_DETAILS = """\
  cls          the CLS token [dim]
  mean         the mean of the patch tokens [dim]
  patches      all patch tokens [patches, dim], row by row

Rows are in the order of the images. Images that cannot be decoded are left out and named in unusable.txt.

  npy          cls.npy, mean.npy, patches.npy, and keys.txt with one key per row: the key in a set, or the path
  parquet      part-*.parquet with the columns key, cls, mean, patches (needs pyarrow)
  tar          part-*.tar, WebDataset shards with KEY.cls.npy, KEY.mean.npy, KEY.patches.npy

Run the same command again to resume. The files do not depend on interruptions. With several GPUs or machines, run
one command per GPU, each with its own --share. The last command to finish joins the parts.
"""
_EXAMPLES = """\
  streamtrain embed photos/ --run runs/photos --out features
  streamtrain embed sets/photos --weights exported --features cls patches --format parquet --out features
  streamtrain embed sets/photos --run runs/photos --device cuda:1 --share 1/4 --out features
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "embed", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument(
        "source", type=path_or_url, metavar="IMAGES", help="shard set (also a URL), folder, list file, tar or zip"
    )
    add_backbone_arguments(parser)
    parser.add_argument("--out", type=local_path, required=True, help="folder to write: new, empty, or to resume")
    parser.add_argument(
        "--features",
        nargs="+",
        choices=FEATURES,
        default=["cls"],
        metavar="F",
        help="features to write: cls (default), mean, patches",
    )
    parser.add_argument("--format", choices=FORMATS, default="npy", help="file format (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the files (default: %(default)s)")
    parser.add_argument(
        "--compute", choices=COMPUTE, default="float32", help="dtype of the network (default: %(default)s)"
    )
    parser.add_argument("--size", type=positive_int, help="side of the input in pixels (default: as in training)")
    parser.add_argument("--batch", type=positive_int, default=64, help="images per forward pass (default: %(default)s)")
    parser.add_argument(
        "--share", type=parse_share, default=(0, 1), metavar="I/N", help="compute only part I of N, counted from 0"
    )
    add_device_argument(parser)


def parse_share(text: str) -> tuple[int, int]:
    """Parse ``I/N`` with 0 <= I < N."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def run(arguments: argparse.Namespace) -> int:
    print(write_selected(arguments))
    return 0


def write_selected(arguments: argparse.Namespace) -> str:
    """Write the features that the options select, and return a line about them.

    Raises:
        StreamtrainError, ShardError: as ``write_features``, or if the network or the images cannot be used.
    """
    # torch takes seconds to load
    import torch

    from streamtrain.cli.backbone import choose_device, load_selected_backbone
    from streamtrain.evaluation.embed import EmbedOptions, write_features
    from streamtrain.evaluation.images import open_source

    if arguments.format == "parquet":
        _require_pyarrow()
    device = choose_device(arguments.device)
    backbone = load_selected_backbone(arguments)
    config = backbone.config
    size = arguments.size or config.image_size
    if size % config.model.patch_size:
        raise StreamtrainError(f"--size {size} is not a multiple of the patch size, {config.model.patch_size}")
    images = open_source(arguments.source, config.background, config.pixels)
    images.require_pixels(config.pixels)
    options = EmbedOptions(
        size, config.resize_for(size), config.mean, config.std, config.value_range,
        tuple(name for name in FEATURES if name in arguments.features), arguments.format, arguments.dtype,
        arguments.batch, arguments.share,
    )  # fmt: skip
    model = backbone.to(device, getattr(torch, arguments.compute)).model
    with writing(arguments.out):
        written = write_features(model, images, arguments.out, options, config.origin)
    if written.rows is None:
        return f"share {arguments.share[0]} of {arguments.share[1]} is complete; others are not"
    unusable = f"; {written.unusable} images were unusable, see unusable.txt" if written.unusable else ""
    return f"wrote {arguments.out} ({', '.join(options.features)} of {written.rows} images{unusable})"


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise StreamtrainError("--format parquet needs pyarrow: pip install 'streamtrain[parquet]'") from error
