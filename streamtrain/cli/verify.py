"""``streamtrain verify``: check a shard set from the first byte to the last."""

from __future__ import annotations

import argparse
from typing import Any

from shards.format.images import DEFAULT_MAX_PIXELS
from shards.format.set_manifest import SetManifest, counted
from shards.packing.verify import verify
from streamtrain.cli.arguments import add_command, positive_int
from streamtrain.run.command_line import path_or_url
from streamtrain.run.machine import available_cores

_SUMMARY = "Check a shard set: every tar, both indexes, the manifest, every checksum, a decode of every image."
_DETAILS = """\
Prints one line for each fault. The exit status is 0 without faults, 1 with faults, and 2 if the set
cannot be read. Each process downloads remote shards, one at a time, to the folder for temporary
files (TMPDIR).
"""
_EXAMPLES = """\
  streamtrain verify sets/photos
  streamtrain verify s3://bucket/set --workers 8
"""


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "verify", _SUMMARY, _DETAILS, _EXAMPLES)
    parser.add_argument("set", type=path_or_url, metavar="SET", help="folder or URL of the set")
    parser.add_argument(
        "--workers", type=positive_int, default=available_cores(), metavar="N", help="processes (default: all cores)"
    )
    parser.add_argument(
        "--max-pixels",
        type=positive_int,
        default=DEFAULT_MAX_PIXELS,
        help="report images with more pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--windows",
        action="store_true",
        help="accept larger TIFFs that crops.window can read, and decode all their parts",
    )


def run(arguments: argparse.Namespace) -> int:
    manifest = SetManifest.load(arguments.set)
    limits = {"max_pixels": arguments.max_pixels, "windows": arguments.windows}
    faults = verify(arguments.set, workers=arguments.workers, progress=True, **limits)
    for fault in faults:
        print(fault)
    print(f"read {manifest.extent}: {counted(len(faults), 'fault') if faults else 'no faults'}")
    return 1 if faults else 0
