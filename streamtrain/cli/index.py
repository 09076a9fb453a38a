"""``streamtrain index``: index existing WebDataset tars in place."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shards.errors import ShardError, printable
from shards.format.label_maps import MAP_KINDS
from shards.format.set_manifest import counted
from shards.packing.index_tars import index_tars
from shards.packing.summary import describe_images
from shards.reading.shard_set import ShardSet
from shards.storage.store import is_url
from streamtrain.cli.arguments import add_command, add_pixel_arguments, pixel_format, positive_int
from streamtrain.run.command_line import path_or_url
from streamtrain.run.machine import available_cores

_SUMMARY = "Make a shard set of existing WebDataset tars without copying them."
_DETAILS = """\
Writes an index of every image, DALI's index, and a manifest that points to the tars. Each tar is
read once. A sample consists of these members, where NAME is the image's name up to its last dot:
  image  the first .jpg, .jpeg, .png, .webp, .tif or .tiff member; with --channels or --dtype also .npy
  label  the integer in NAME.cls
  maps   NAME.seg.png (class ids) and NAME.depth.npy or NAME.depth.png (depth); they are not decoded

Other members are counted by kind.
"""
_EXAMPLES = """\
  streamtrain index --src /data/wds --out sets/wds
  streamtrain index --src '/data/a/*.tar' /data/b/000.tar --out sets/both
  streamtrain index --src https://example.org/wds/000.tar s3://bucket/wds --out sets/remote
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "index", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("--src", type=path_or_url, nargs="+", required=True, metavar="TAR|DIR|URL", help="the tars")
    parser.add_argument("--out", type=path_or_url, required=True, metavar="SET", help="folder of the set; new or empty")
    parser.add_argument(
        "--workers", type=positive_int, default=available_cores(), metavar="N", help="processes (default: all cores)"
    )
    add_pixel_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.out.strip():
        raise ShardError("--out is empty; give the folder of the set")
    if is_url(arguments.out):
        raise ShardError(f"--out {arguments.out} is a URL; give a local folder")
    report = index_tars(
        arguments.src, Path(arguments.out), workers=arguments.workers, progress=True, pixels=pixel_format(arguments)
    )
    lines = report.passed_over.lines()
    lines += (f"left out, no images: {url}" for url in report.empty)
    lines += (f"no index for DALI's own reader: {refusal}" for refusal in report.without_dali)
    maps = report.manifest.maps
    lines += (f"maps: {counted(sum(maps[kind]), 'image')} with a {MAP_KINDS[kind].title}" for kind in maps)
    lines += describe_images(ShardSet.open(arguments.out))
    for line in lines:
        print(printable(line))
    manifest = report.manifest
    print(
        f"indexed {manifest.extent}, {manifest.num_bytes} bytes; "
        f"{report.num_unreadable} unreadable; digest {manifest.digest}"
    )
    return 0
