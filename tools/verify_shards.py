"""Check a shard set from the first byte to the last. `python tools/verify_shards.py --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shards.errors import ShardError
from shards.format.images import DEFAULT_MAX_PIXELS
from shards.format.set_manifest import SetManifest, counted
from shards.packing.verify import verify

_HELP = """\
Read everything in a shard set: every tar, both indexes, the manifest, every checksum, and a full
decode of every image. Prints a line for each fault; exits 0 if there is none, 1 if there are any,
2 if there is no set to read. Shards in a store are fetched one by one, by each process, to a folder for
temporary files (TMPDIR).
"""


def main() -> int:
    """Parse, verify, print."""
    parser = argparse.ArgumentParser(description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", metavar="SET", help="the folder of the set, or its URL")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    parser.add_argument("--max-pixels", type=int, default=DEFAULT_MAX_PIXELS, help="larger images are faults")
    arguments = parser.parse_args()
    try:
        manifest = SetManifest.load(arguments.set)
        faults = verify(
            arguments.set, workers=max(1, arguments.workers), max_pixels=arguments.max_pixels, progress=True
        )
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for fault in faults:
        print(fault)
    print(f"read {manifest.extent}: {counted(len(faults), 'fault') if faults else 'no faults'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
