"""``streamtrain pack``: pack images into a shard set."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from shards.errors import ShardError, printable
from shards.format.files import write_whole
from shards.format.images import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY
from shards.format.label_maps import MAP_KINDS
from shards.format.set_manifest import counted
from shards.packing.items import Inputs
from shards.packing.pack import PackOptions, pack
from shards.packing.parquet import Columns
from shards.packing.summary import (
    contact_sheet,
    describe_classes,
    describe_images,
    describe_rejected,
    split_warning,
)
from shards.packing.tiles import Tiling
from shards.reading.shard_set import ShardSet
from streamtrain.cli.arguments import (
    add_command,
    add_pixel_arguments,
    byte_size,
    jpeg_quality,
    max_pixels,
    max_side,
    non_negative_int,
    pixel_format,
    positive_int,
    writing,
)
from streamtrain.run import interrupts
from streamtrain.run.command_line import local_path, path_or_url
from streamtrain.run.machine import available_cores
from streamtrain.run.signals import EXIT_INTERRUPTED

_SUMMARY = "Pack images into a shard set: WebDataset tars, an index of every image, and a manifest."
_DETAILS = """\
Every image is decoded in full before it is packed. Images that do not decode are left out and
listed with the reason in SET/rejected.jsonl. Re-run the same command to resume an interrupted
packing. On a finished set it changes nothing. The result does not depend on --workers.

Before packing, the command prints the classes that it found. At the end it prints the sizes, formats
and channels of the images. --preview draws 48 images as training sees them, with their classes.

--src is one of
  a folder    searched recursively; class subfolders become labels, sorted by name, from 0. A flat folder
              has no labels.
  a list      a text file with one path or URL per line. Paths are relative to the file, or start with ~/.
              An optional label follows a tab: a number (-1 for none) or a name.
  an archive  .tar, .tar.gz, .tar.xz, .tar.bz2 or .zip. Labels come from .cls members (a.b.cls for
              a.b.jpg), otherwise from class folders.
  parquet     a file, or a folder of parquet files without images. Images are a column of bytes, or of
              structs with bytes as Hugging Face writes them. Labels are the column "label". Needs
              pyarrow. --shuffle reorders row groups and mixes within each.
  a URL       of a folder, a tar (copied next to the set first) or a parquet file.

Other channels: by default, images are decoded as 8-bit RGB. With other --channels or --dtype, the stored
values are kept, from PNG, TIFF, .npy and other formats. Images with another number of channels or another
type are left out. Mean, standard deviation and percentiles of each channel are added to the manifest.
This needs the extra imagery. DICOM files (.dcm, one monochrome frame) also need the extra dicom.

Tiles: --tiles cuts slides, scenes and scans into tiles, which are stored without loss. Tiles of background
are skipped and counted. This needs the extra imagery.

Maps: --seg and --depth pack a map of class ids or of depth with each image that has one, byte for byte.
They are used by streamtrain evaluate and by evaluation while training. Training itself ignores them. In a
tar or zip, maps are members with the name of the image: a.seg.png, a.depth.npy or a.depth.png for a.jpg.
Unusable maps are listed in SET/rejected.jsonl, and their images are packed without them.

URLs: the images and the set may be at any URL that fsspec supports (s3://, gs://, hf://, and http(s)://
for reading only). A set for a URL is packed in a local folder. Each shard is removed from there after its
upload. The manifest is uploaded last.
"""
_EXAMPLES = """\
  streamtrain pack --src photos/ --out sets/photos --preview photos.png
  streamtrain pack --src imagenet/train --out /data/imagenet --max-side 512 --workers 32
  streamtrain pack --src list.txt --out sets/mine --shuffle 1
  streamtrain pack --src tiles/ --out sets/tiles --channels 13 --dtype uint16
  streamtrain pack --src slides/ --out sets/slides --tiles 512
  streamtrain pack --src images/ --seg masks/ --depth depth/ --out sets/dense
  streamtrain pack --src hf://datasets/OWNER/NAME/data --out sets/downloaded
  streamtrain pack --src s3://bucket/raw --out s3://bucket/set
"""

PREVIEW = "preview.png"

logger = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "pack", _SUMMARY, _DETAILS, _EXAMPLES)
    add = parser.add_argument
    add("--src", type=path_or_url, required=True, metavar="DIR|LIST|TAR|ZIP|PARQUET|URL", help="the images")
    add("--out", type=path_or_url, required=True, metavar="SET", help="folder or URL of the set; new or empty")
    add("--shard-size", type=byte_size, default="256MB", metavar="SIZE", help="maximum size of a tar (default: 256MB)")
    add(
        "--workers", type=positive_int, default=available_cores(), metavar="N",
        help="decoding processes (default: all cores)",
    )  # fmt: skip
    add("--max-side", type=max_side, metavar="PIXELS", help="shrink larger images to this side, stored as JPEG")
    add(
        "--quality",
        type=jpeg_quality,
        default=DEFAULT_QUALITY,
        help="quality of re-encoded JPEGs (default: %(default)s)",
    )
    add_pixel_arguments(parser)
    add(
        "--tiles", type=positive_int, metavar="SIDE",
        help="cut images into tiles of SIDE x SIDE pixels; each tile is a sample",
    )  # fmt: skip
    add("--overlap", type=non_negative_int, metavar="PIXELS", help="pixels that neighbouring tiles share (default: 0)")
    add(
        "--tile-contrast", type=float, metavar="SHARE",
        help="skip tiles whose 1st and 99th percentile differ by less than this share of the value range in every "
        "channel; 0 keeps all (default: 0.02 for uint8, 0.0001 for other types)",
    )  # fmt: skip
    add(
        "--seg", type=local_path, metavar="DIR",
        help="masks of class ids: DIR/a/1.png for the image a/1.jpg of --src",
    )  # fmt: skip
    add(
        "--depth", type=local_path, metavar="DIR", help="depth maps: DIR/a/1.npy or .png for the image a/1.jpg of --src"
    )
    add(
        "--max-pixels", type=max_pixels, default=DEFAULT_MAX_PIXELS,
        help="reject larger images (default: %(default)s)",
    )  # fmt: skip
    add(
        "--orientation", choices=("keep", "apply"), default="keep",
        help="EXIF orientation: keep (default) stores the bytes, decoders rotate; apply stores a rotated new JPEG",
    )  # fmt: skip
    add("--shuffle", type=int, metavar="SEED", help="pack in random order, for sources that are sorted by class")
    add("--image-column", metavar="NAME", help="image column of parquet files (default: the only one with images)")
    add(
        "--label-column", metavar="NAME",
        help="label column of parquet files (default: label, if present; '' for no labels)",
    )  # fmt: skip
    add(
        "--scratch", type=local_path, metavar="DIR",
        help="local folder in which a set for a URL is packed (default: in ~/.cache/streamtrain)",
    )  # fmt: skip
    add("--dedup", action="store_true", help="leave out images whose bytes equal an earlier image's")
    add(
        "--preview", type=local_path, nargs="?", const=PREVIEW, metavar="P.png",
        help=f"draw images of the packed set with their classes (default file: {PREVIEW})",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    options = PackOptions(
        shard_bytes=arguments.shard_size,
        max_side=arguments.max_side,
        quality=arguments.quality,
        max_pixels=arguments.max_pixels,
        upright=arguments.orientation == "apply",
        shuffle=arguments.shuffle,
        dedup=arguments.dedup,
        pixels=pixel_format(arguments),
        tiles=tiling(arguments),
        seg=arguments.seg,
        depth=arguments.depth,
    )
    if not arguments.out.strip():
        raise ShardError("--out is empty; give the folder or the URL of the set")
    try:
        report = pack(
            arguments.src,
            arguments.out,
            options,
            columns=Columns(arguments.image_column, arguments.label_column),
            workers=arguments.workers,
            progress=True,
            scratch=arguments.scratch,
            on_listed=print_listing,
        )
    except KeyboardInterrupt:
        interrupts.report(f"interrupted; run the same command again to resume packing {printable(arguments.out)}")
        return EXIT_INTERRUPTED
    manifest = report.manifest
    log = f"{arguments.out.rstrip('/')}/rejected.jsonl"
    if report.rejected is None:
        rejected = f"number of rejected images unknown, because {log} is missing"
    else:
        rejected = f"{report.num_rejected} rejected"
        print_lines(describe_rejected(report.rejected, log))
    print_lines(report.passed_over.lines())
    shard_set = ShardSet.open(arguments.out)
    print_lines(describe_images(shard_set))
    if arguments.preview:
        with writing(arguments.preview, "--preview"):
            write_whole(arguments.preview, contact_sheet(shard_set, manifest.classes))
        print(printable(f"wrote {arguments.preview}"))
    for kind, counts in manifest.maps.items():
        print(f"maps: {counted(sum(counts), 'image')} with a {MAP_KINDS[kind].title}")
    size = f"{tqdm.format_sizeof(manifest.num_bytes)}B"
    print(
        f"{'packed' if report.is_new else 'already packed:'} {manifest.extent}, {size}; "
        f"{rejected}, {report.num_ignored} other files ignored; digest {manifest.digest}"
    )
    return 0


def tiling(arguments: argparse.Namespace) -> Tiling | None:
    if arguments.tiles is not None:
        return Tiling(arguments.tiles, arguments.overlap or 0, arguments.tile_contrast)
    for option, value in (("--overlap", arguments.overlap), ("--tile-contrast", arguments.tile_contrast)):
        if value is not None:
            raise ShardError(f"{option} applies to tiles; add --tiles SIDE")
    return None


def print_listing(inputs: Inputs) -> None:
    """Print the classes of a source before its images are packed."""
    print_lines(describe_classes([item.label for item in inputs.items], inputs.classes))
    sys.stdout.flush()
    if warning := split_warning(inputs.classes):
        logger.warning(printable(warning))


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(printable(line))
