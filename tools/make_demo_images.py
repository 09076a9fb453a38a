#!/usr/bin/env python3
"""Draw a labelled demo set: JPEGs in one folder per class, identical for the same seed on any machine.

python tools/make_demo_images.py --out DIR [--count 2400] [--size 112] [--seed 0] [--workers N]
python tools/make_demo_images.py --out DIR --labels LABELS    # also LABELS/masks and LABELS/depth of these images
python tools/make_demo_images.py --out PAIRS --pairs      # PAIRS/pairs.jsonl: two views of a scene each, and points
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
from demo_pairs import draw_pair
from PIL import Image

from shards.packing.parallel import ordered_map
from streamtrain.run.command_line import CommandParser, local_path
from streamtrain.run.progress import progress_bar
from streamtrain.run.signals import EXIT_INTERRUPTED

VERSION = 5
# hidden, so that readers of the folder skip it
RECORD = ".demo.json"


def write_images(folder: Path | None, labels: Path | None, seed: int, size: int, indices: range) -> int:
    """Draw and write images ``indices``, each a pure function of (seed, size, index); return their number.

    Args:
        folder: of the images; None leaves them out.
        labels: folder of their masks and depth; None leaves these out.
    """
    names = list(CLASSES)
    for index in indices:
        rng = np.random.default_rng([seed, index])
        name = names[index % len(names)]
        # sizes and JPEG qualities vary, as in photographs
        width, height = (int(side) for side in np.rint(size * rng.uniform(0.86, 1.14, 2)))
        drawing = draw(name, rng, width, height)
        if labels is not None:
            Image.fromarray(drawing.mask).save(labels / "masks" / name / f"{index:06d}.png")
            Image.fromarray(drawing.depth).save(labels / "depth" / name / f"{index:06d}.png")
        if folder is not None:
            image = Image.fromarray(drawing.image)
            image.save(folder / name / f"{index:06d}.jpg", quality=int(rng.integers(82, 95)))
    return len(indices)


def write_pairs(folder: Path, seed: int, size: int, indices: range) -> int:
    """Draw and write pairs ``indices``, each a pure function of (seed, size, index); return their number."""
    names = list(CLASSES)
    for index in indices:
        # other scenes than the images of the same seed
        pair = draw_pair(names[index % len(names)], np.random.default_rng([seed, index, 1]), size)
        record: dict[str, object] = {}
        for letter, image, points in zip("ab", pair.images, pair.points, strict=True):
            name = f"images/{index:06d}-{letter}.jpg"
            Image.fromarray(image).save(folder / name, quality=90)
            record |= {f"image_{letter}": name, f"points_{letter}": points.round(2).tolist()}
        # one file each, because the processes finish in any order
        (folder / f"{index:06d}.json").write_text(json.dumps(record) + "\n")
    return len(indices)


def join_records(folder: Path) -> None:
    """Join the records of all pairs to ``pairs.jsonl``, without scenes whose objects are not in both views."""
    with open(folder / "pairs.jsonl", "w") as file:
        for path in sorted(folder.glob("*.json")):
            line = path.read_text()
            if json.loads(line)["points_a"]:
                file.write(line)
            path.unlink()


def make_demo_images(
    out: Path,
    count: int,
    size: int,
    seed: int,
    workers: int,
    progress: bool = True,
    labels: Path | None = None,
    kind: str = "images",
) -> bool:
    """Write the set to ``out``, and its masks and depth to ``labels``, unless complete; return whether it was drawn.

    Each folder is written as ``FOLDER.partial``, which is renamed when complete.

    Raises:
        ValueError: a folder contains something else.
    """
    record = {"version": VERSION, "count": count, "size": size, "seed": seed}
    if kind != "images":
        record[kind] = True
    missing = {}
    for folder, expected in ((out, record), *([(labels, record | {"labels": True})] if labels is not None else [])):
        if not _is_complete(folder, expected):
            missing[folder] = expected
    if not missing:
        return False
    partials = {folder: folder.with_name(f"{folder.name}.partial") for folder in missing}
    for folder, partial_folder in partials.items():
        shutil.rmtree(partial_folder, ignore_errors=True)
        if kind == "pairs":
            (partial_folder / "images").mkdir(parents=True)
        else:
            for part in ("",) if folder == out else ("masks", "depth"):
                for name in CLASSES:
                    (partial_folder / part / name).mkdir(parents=True)
    parts = [range(start, min(start + 40, count)) for start in range(0, count, 40)]
    write = (
        partial(write_pairs, partials[out], seed, size) if kind == "pairs" else
        partial(write_images, partials.get(out), None if labels is None else partials.get(labels), seed, size)
    )  # fmt: skip
    with (
        closing(ordered_map(write, parts, workers)) as written,
        progress_bar("drawing", count, "images", shown=progress) as bar,
    ):
        for number in written:
            bar.update(number)
    if kind == "pairs":
        join_records(partials[out])
    for folder, expected in missing.items():
        (partials[folder] / RECORD).write_text(json.dumps(expected) + "\n")
        if folder.exists():
            folder.rmdir()  # empty, as checked above
        os.replace(partials[folder], folder)
    return True


def _is_complete(folder: Path, expected: dict[str, int]) -> bool:
    """Return whether a folder has the set; raises ValueError if it contains something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder} exists and is not a demo set; choose another folder, or remove it")
    existing = json.loads(path.read_text())
    if existing != expected:
        raise ValueError(f"{folder} is a different demo set ({existing}); remove it, or choose another folder")
    return True


def main() -> int:
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=local_path, required=True, help="folder to write, with one subfolder per class")
    parser.add_argument("--count", type=int, default=2400, help="number of images (default 2400)")
    parser.add_argument("--size", type=int, default=112, help="approximate side in pixels (default 112)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--labels", type=local_path, metavar="LABELS", help="folder to write with the masks and the depth of the images"
    )
    kinds.add_argument("--pairs", action="store_true", help="write pairs of views, and corresponding points, instead")
    arguments = parser.parse_args()
    out, workers = arguments.out, arguments.workers
    kind = "pairs" if arguments.pairs else "images"
    try:
        if arguments.count < len(CLASSES) or arguments.size < 32 or workers < 1:
            raise ValueError(f"--count must be at least {len(CLASSES)}, --size 32, --workers 1")
        new = make_demo_images(
            out, arguments.count, arguments.size, arguments.seed, workers, labels=arguments.labels, kind=kind
        )
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
    what = "pairs of views" if arguments.pairs else "images"
    also = f", their masks and depth in {arguments.labels}" if arguments.labels else ""
    print(f"{word} {arguments.count} {what} of {len(CLASSES)} classes in {out}{also}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
