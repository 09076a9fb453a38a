"""``streamtrain stats``: compute the statistics of a set's channels."""

from __future__ import annotations

import argparse
from typing import Any

from shards.errors import printable
from shards.format.pixels import VALUE_RANGES
from shards.format.statistics import PERCENTILES
from shards.packing.statistics import store_statistics
from streamtrain.cli.arguments import add_command, positive_int
from streamtrain.run.command_line import path_or_url
from streamtrain.run.machine import available_cores

_SUMMARY = "Compute mean, standard deviation and percentiles of each channel of a set, and store them in its manifest."
_DETAILS = """\
Decodes every image once. The statistics are in stored units, such as 0 to 255. A recipe uses them with
crops.mean=from_set and crops.std=from_set. If the set cannot be written to, such as a set at an
http(s):// URL, mean and standard deviation are printed as settings of a recipe.
"""
_EXAMPLES = """\
  streamtrain stats sets/photos
  streamtrain stats s3://bucket/tiles --workers 8
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "stats", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("set", type=path_or_url, metavar="SET", help="folder or URL of the set")
    parser.add_argument(
        "--workers", type=positive_int, default=available_cores(), metavar="N", help="processes (default: all cores)"
    )


def run(arguments: argparse.Namespace) -> int:
    stored = store_statistics(arguments.set, workers=arguments.workers, progress=True)
    statistics = stored.statistics
    names = ["mean", "std", *(f"p{percent}" for percent in PERCENTILES)]
    rows = [statistics.mean, statistics.std, *statistics.percentiles.values()]
    print("channel" + "".join(f"{name:>12}" for name in names))
    for channel, values in enumerate(zip(*rows, strict=True)):
        print(f"{channel:>7}" + "".join(f"{value:>12.6g}" for value in values))
    if not stored.fault:
        print(f"stored the statistics of {statistics.images} images in the manifest")
        return 0
    low, high = VALUE_RANGES[stored.manifest.pixels.dtype]
    mean = ",".join(f"{(value - low) / (high - low):.6g}" for value in statistics.mean)
    std = ",".join(f"{value / (high - low):.6g}" for value in statistics.std)
    print(printable(f"not stored: {stored.fault}; in place of from_set, with crops.value_range=[{low:g},{high:g}]:"))
    print(f"crops.mean=[{mean}] crops.std=[{std}]")
    return 0
