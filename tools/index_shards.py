"""Train from WebDataset tars made by others, where they lie. `python tools/index_shards.py --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards.errors import ShardError
from shards.packing.index_tars import index_tars

_HELP = """\
Make a shard set of WebDataset tars that exist already, without copying them: an index of every
image, DALI's index, and a manifest that points to the tars. Each tar is read once.
"""
_EXAMPLES = """\
examples:
  python tools/index_shards.py --src /data/wds --out sets/wds
  python tools/index_shards.py --src '/data/a/*.tar' /data/b/000.tar --out sets/both
  python tools/index_shards.py --src https://example.org/wds/000.tar s3://bucket/wds --out sets/remote

A sample's image is its first .jpg, .jpeg, .png, .webp, .tif or .tiff member, its label the integer in .cls.
"""


def main() -> int:
    """Parse, index, print."""
    parser = argparse.ArgumentParser(
        description=_HELP, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", nargs="+", required=True, metavar="TAR|DIR|URL", help="the tars")
    parser.add_argument("--out", required=True, metavar="SET", help="the folder of the set; new or empty")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    arguments = parser.parse_args()
    try:
        if not arguments.out.strip():
            raise ShardError("--out is empty; give the folder of the set")
        report = index_tars(arguments.src, Path(arguments.out), workers=max(1, arguments.workers), progress=True)
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for url in report.empty:
        print(f"left out, no images: {url}")
    for refusal in report.without_dali:
        print(f"no index for DALI's own reader: {refusal}")
    manifest = report.manifest
    print(
        f"indexed {manifest.extent}, {manifest.num_bytes} bytes; "
        f"{report.num_unreadable} unreadable; digest {manifest.digest}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
