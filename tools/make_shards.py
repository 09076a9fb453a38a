"""Pack images into a shard set that streamtrain, webdataset and DALI read. `python tools/make_shards.py --help`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards.errors import ShardError
from shards.format.images import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY
from shards.packing.pack import PackOptions, pack
from shards.packing.parquet import Columns

_HELP = """\
Pack images into a shard set: WebDataset tars, an index of every image, and a manifest.

Every image is decoded in full first; what does not decode is left out and listed, with the
reason, in SET/rejected.jsonl. Interrupted or killed, the same command goes on where it was;
finished, it does nothing. The result does not depend on --workers.

Both the images and the set may lie behind a URL that fsspec knows (s3://, gs://, hf://, http(s)://;
the last for reading only). A set for a URL is packed in a local folder, which each shard leaves once
it is sent; the manifest is sent last.
"""
_EXAMPLES = """\
examples:
  python tools/make_shards.py --src photos/ --out shards/photos
  python tools/make_shards.py --src imagenet/train --out /data/imagenet --max-side 512 --workers 32
  python tools/make_shards.py --src list.txt --out shards/mine --shuffle 1
  python tools/make_shards.py --src hf://datasets/OWNER/NAME/data --out shards/theirs
  python tools/make_shards.py --src s3://bucket/raw --out s3://bucket/set

--src is one of
  a folder    searched in depth; class subfolders become labels (names sorted, from 0), a flat folder has none
  a list      a text file with a path or URL a line, relative to the file; a tab and a label may follow:
              numbers (-1 for none) or names
  a tar       .tar, .tar.gz, .tar.xz or .tar.bz2; labels from .cls members, else from class folders
  a parquet   or a folder of them and of no images: a column of bytes, or of structs with bytes, as Hugging
              Face has them; labels from the column "label". Needs pyarrow. --shuffle moves whole row groups,
              and mixes within each
  a URL       of a folder, a tar (which is copied beside the set first) or a parquet
"""


def main() -> int:
    """Parse, pack, print."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _parser().parse_args()
    options = PackOptions(
        shard_bytes=arguments.shard_size,
        max_side=arguments.max_side,
        quality=arguments.quality,
        max_pixels=arguments.max_pixels,
        upright=arguments.orientation == "apply",
        shuffle=arguments.shuffle,
        dedup=arguments.dedup,
    )
    try:
        if not arguments.out.strip():
            raise ShardError("--out is empty; give the folder of the set, or its URL")
        report = pack(
            arguments.src,
            arguments.out,
            options,
            columns=Columns(arguments.image_column, arguments.label_column),
            workers=arguments.workers,
            progress=True,
            scratch=arguments.scratch,
        )
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; run the same command again to go on in {arguments.out}", file=sys.stderr)
        return 130
    manifest = report.manifest
    log = f"{arguments.out.rstrip('/')}/rejected.jsonl"
    if report.num_rejected is None:
        rejected = f"rejected: not known any more, {log} is gone"
    else:
        rejected = f"{report.num_rejected} rejected" + (f" (see {log})" if report.num_rejected else "")
    print(
        f"packed {manifest.extent}, {manifest.num_bytes} bytes; "
        f"{rejected}, {report.num_ignored} other files ignored; digest {manifest.digest}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=_HELP, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--src", required=True, metavar="DIR|LIST|TAR|PARQUET|URL", help="the images")
    add("--out", required=True, metavar="SET", help="the folder of the set, or its URL; new or empty")
    add("--shard-size", type=_bytes, default="256MB", metavar="SIZE", help="largest tar, such as 64MB or 1GB (256MB)")
    add("--workers", type=_positive, default=os.cpu_count() or 1, metavar="N", help="decoding processes (all cores)")
    add("--max-side", type=_positive, metavar="PIXELS", help="shrink larger images to this side and store them as JPEG")
    add("--quality", type=_positive, default=DEFAULT_QUALITY, help=f"of JPEGs made anew ({DEFAULT_QUALITY})")
    add("--max-pixels", type=_positive, default=DEFAULT_MAX_PIXELS, help="reject larger images (%(default)s)")
    add(
        "--orientation",
        choices=("keep", "apply"),
        default="keep",
        help="EXIF rotation: keep the bytes, decoders turn the image (the default); or apply it now, as a new JPEG",
    )
    add("--shuffle", type=int, metavar="SEED", help="pack in random order; for sources that are sorted by class")
    add("--image-column", metavar="NAME", help="of parquet files (the only column that holds images)")
    add("--label-column", metavar="NAME", help="""of parquet files ("label", if there is one; '' for none)""")
    add("--scratch", type=Path, metavar="DIR", help="where a set for a URL is packed (a folder for temporary files)")
    add("--dedup", action="store_true", help="leave out images whose bytes were packed before")
    return parser


def _bytes(text: str) -> int:
    """A size with a decimal unit; bare numbers are bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64MB or 1GB")
    return size


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
