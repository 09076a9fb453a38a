#!/usr/bin/env python3
"""Draw a labelled demo set: JPEGs in one folder per class, identical for the same seed on any machine.

python tools/make_demo_images.py --out DIR [--count 2400] [--size 112] [--seed 0] [--workers N]
python tools/make_demo_images.py --out LABELS --labels    # LABELS/masks and LABELS/depth of the same images
"""

from __future__ import annotations

from streamtrain.run import interrupts

if __name__ == "__main__":
    # before the slow imports
    interrupts.end_quietly_on_interrupt()
    interrupts.raise_on_interrupt()

import json
import os
import shutil
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from demo_images import CLASSES, draw
from PIL import Image

from shards.packing.parallel import ordered_map
from streamtrain.run.command_line import CommandParser, local_path
from streamtrain.run.progress import progress_bar
from streamtrain.run.signals import EXIT_INTERRUPTED

VERSION = 5
# hidden, so that readers of the folder skip it
RECORD = ".demo.json"


def write_images(folder: Path, seed: int, size: int, labels: bool, indices: range) -> int:
    """Draw and write images ``indices``, each a pure function of (seed, size, index); return their number.

    Args:
        labels: write the masks and the depth of these images instead.
    """
    names = list(CLASSES)
    for index in indices:
        rng = np.random.default_rng([seed, index])
        name = names[index % len(names)]
        # sizes and JPEG qualities vary, as in photographs
        width, height = (int(side) for side in np.rint(size * rng.uniform(0.86, 1.14, 2)))
        drawing = draw(name, rng, width, height)
        if labels:
            Image.fromarray(drawing.mask).save(folder / "masks" / name / f"{index:06d}.png")
            Image.fromarray(drawing.depth).save(folder / "depth" / name / f"{index:06d}.png")
        else:
            image = Image.fromarray(drawing.image)
            image.save(folder / name / f"{index:06d}.jpg", quality=int(rng.integers(82, 95)))
    return len(indices)


def make_demo_images(
    out: Path, count: int, size: int, seed: int, workers: int, progress: bool = True, labels: bool = False
) -> bool:
    """Write the set to ``out`` unless it is complete; return whether it was drawn now.

    The images are drawn in ``OUT.partial``, which is renamed to ``out`` when complete.

    Raises:
        ValueError: ``out`` contains something else.
    """
    record = {"version": VERSION, "count": count, "size": size, "seed": seed} | ({"labels": True} if labels else {})
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        path = out / RECORD
        if not path.is_file():
            raise ValueError(f"{out} exists and is not a demo set; choose another --out, or remove it")
        existing = json.loads(path.read_text())
        if existing != record:
            raise ValueError(f"{out} is a different demo set ({existing}); remove it, or choose another --out")
        return False
    folder = out.with_name(f"{out.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    for kind in ("masks", "depth") if labels else ("",):
        for name in CLASSES:
            (folder / kind / name).mkdir(parents=True)
    parts = [range(start, min(start + 40, count)) for start in range(0, count, 40)]
    with (
        closing(ordered_map(partial(write_images, folder, seed, size, labels), parts, workers)) as written,
        progress_bar("drawing", count, "images", shown=progress) as bar,
    ):
        for number in written:
            bar.update(number)
    (folder / RECORD).write_text(json.dumps(record) + "\n")
    if out.exists():
        out.rmdir()  # empty, as checked above
    os.replace(folder, out)
    return True


def main() -> int:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=local_path, required=True, help="folder to write, with one subfolder per class")
    parser.add_argument("--count", type=int, default=2400, help="number of images (default 2400)")
    parser.add_argument("--size", type=int, default=112, help="approximate side in pixels (default 112)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--labels", action="store_true", help="write masks and depth of the images instead")
    arguments = parser.parse_args()
    out, workers = arguments.out, arguments.workers
    try:
        if arguments.count < len(CLASSES) or arguments.size < 32 or workers < 1:
            raise ValueError(f"--count must be at least {len(CLASSES)}, --size 32, --workers 1")
        new = make_demo_images(out, arguments.count, arguments.size, arguments.seed, workers, labels=arguments.labels)
    except KeyboardInterrupt:
        interrupts.report()
        return EXIT_INTERRUPTED
    except OSError as error:
        print(f"error: cannot write {out} ({error.strerror or error}); choose another --out", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    word = "drew" if new else "found"
    what = "masks and depth maps" if arguments.labels else "images"
    print(f"{word} {arguments.count} {what} of {len(CLASSES)} classes in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
