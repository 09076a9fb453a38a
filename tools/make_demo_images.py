#!/usr/bin/env python3
"""Draw a labelled demo set: JPEGs in one folder a class, the same for the same seed, on any machine.

python tools/make_demo_images.py --out DIR [--count 2400] [--size 112] [--seed 0] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from demo_images import CLASSES, draw

from streamtrain.run.progress import progress_bar

VERSION = 5
RECORD = ".demo.json"  # hidden, so that whatever reads the folder's images passes it by


def write_images(folder: Path, seed: int, size: int, indices: range) -> int:
    """Draw and write images ``indices``; each depends on (seed, size, index) alone. Returns how many."""
    names = list(CLASSES)
    for index in indices:
        rng = np.random.default_rng([seed, index])
        name = names[index % len(names)]
        # Sides vary, as those of photographs do; the quality of JPEG likewise.
        width, height = (int(side) for side in np.rint(size * rng.uniform(0.86, 1.14, 2)))
        image = Image.fromarray(draw(name, rng, width, height))
        image.save(folder / name / f"{index:06d}.jpg", quality=int(rng.integers(82, 95)))
    return len(indices)


def make_demo_images(
    out: Path, count: int, size: int, seed: int, workers: int, progress: bool = True
) -> bool:
    """Write the set at ``out``, or find it finished there; True if it was drawn now.

    The images are drawn in a folder beside ``out`` that takes its name when all are there, so a finished name
    is a finished set. Raises ValueError when ``out`` holds something else.
    """
    wanted = {"version": VERSION, "count": count, "size": size, "seed": seed}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        record = out / RECORD
        if not record.is_file():
            raise ValueError(f"{out} exists and is not a demo set: choose another --out, or remove it")
        found = json.loads(record.read_text())
        if found != wanted:
            raise ValueError(f"{out} holds another demo set ({found}): remove it, or choose another --out")
        return False
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in CLASSES:
        (partial / name).mkdir(parents=True)
    parts = [range(start, min(start + 40, count)) for start in range(0, count, 40)]
    with (
        ProcessPoolExecutor(max_workers=workers) as pool,
        progress_bar("drawing", count, "images", shown=progress) as bar,
    ):
        for future in [pool.submit(write_images, partial, seed, size, part) for part in parts]:
            bar.update(future.result())
    (partial / RECORD).write_text(json.dumps(wanted) + "\n")
    if out.exists():
        out.rmdir()  # empty, as checked above
    os.replace(partial, out)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; one subfolder a class")
    parser.add_argument("--count", type=int, default=2400, help="images in all (default 2400)")
    parser.add_argument("--size", type=int, default=112, help="about this many pixels a side (default 112)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    arguments = parser.parse_args()
    out, workers = arguments.out, arguments.workers
    try:
        if arguments.count < len(CLASSES) or arguments.size < 32 or workers < 1:
            raise ValueError(f"--count must be at least {len(CLASSES)}, --size 32, --workers 1")
        new = make_demo_images(out, arguments.count, arguments.size, arguments.seed, workers)
    except OSError as error:
        print(f"error: cannot write {out} ({error.strerror or error}); choose another --out", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    word = "drew" if new else "found"
    print(f"{word} {arguments.count} images of {len(CLASSES)} classes in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
