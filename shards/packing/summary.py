"""Lines about the images of a source or a set: classes, sizes, formats and channels; and a page of small images."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from shards.errors import ShardError, printable
from shards.format.decode import decode
from shards.format.image_files import find_format, open_as
from shards.format.pixels import VALUE_RANGES, to_rgb8
from shards.format.set_manifest import SetManifest, counted
from shards.format.tar_members import NO_LABEL
from shards.reading.shard_set import ShardSet

_SHOWN_CLASSES = 12
_SHOWN_REASONS = 5
# begins the reason of an image whose map cannot be used
LEFT_OUT = "packed without"
# images whose headers are read for the formats; a read from a store takes much longer
_SAMPLED, _SAMPLED_REMOTE = 2000, 50
# shards whose index is read for the sizes, since a set may have more images than fit into memory
_MAX_SHARDS = 256
# folder names of the parts of a data set
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation"}
# names of Pillow's modes
_CHANNELS = {
    "1": "black and white", "L": "grey", "I;16": "grey of 16 bits", "LA": "grey with alpha", "RGB": "colour",
    "RGBA": "colour with alpha", "P": "palette", "PA": "palette with alpha", "CMYK": "CMYK",
}  # fmt: skip
# decoding larger images takes longer than a training step leaves time for
_LARGE_PIXELS = 2_000_000
_TILE, _GAP, _CAPTION, _COLUMNS = 160, 12, 18, 8  # pixels, of the page of images
_INK, _PAPER = (28, 30, 38), (255, 255, 255)


def describe_classes(labels: Sequence[int], classes: Sequence[str]) -> list[str]:
    """Return lines about the classes of a source.

    Args:
        labels: of each image; ``NO_LABEL`` without one.
        classes: class names by label; empty if labels have no names.
    """
    counts = Counter(labels)
    num_unlabelled = counts.pop(NO_LABEL, 0)
    found = f"found {counted(len(labels), 'image')}"
    if not counts:
        return [f"{found} without labels; with a subfolder per class, evaluation could use them"]
    names = {label: classes[label] if 0 <= label < len(classes) else str(label) for label in counts}
    shown = [f"{names[label]} {count}" for label, count in sorted(counts.items())]
    if len(shown) > _SHOWN_CLASSES:
        most, least = max(counts.values()), min(counts.values())
        shown[_SHOWN_CLASSES - 1 :] = [
            f"and {len(shown) - _SHOWN_CLASSES + 1} more ({least} to {most} images in each class)"
        ]
    kind = "class" if len(counts) == 1 else "classes"
    lines = [f"{found} in {len(counts)} {kind}: {', '.join(shown)}"]
    if num_unlabelled:
        lines.append(f"images in no class folder, which have no label: {num_unlabelled}")
    return lines


def split_warning(classes: Sequence[str]) -> str | None:
    """Return a warning if class folders are the parts of a data set, otherwise None."""
    splits = [name for name in classes if name.lower() in _SPLITS]
    if not splits or len(splits) < min(len(classes), 2):
        return None
    return (
        f"the classes are called {', '.join(splits)}: these are parts of a data set, not classes; pack each part as a "
        f"set of its own, such as --src .../{splits[0]}"
    )


def describe_images(shard_set: ShardSet) -> list[str]:
    """Return lines about the sizes, formats and channels of a set's images. Raises ShardError or OSError."""
    chosen = np.unique(np.linspace(0, shard_set.num_shards - 1, min(_MAX_SHARDS, shard_set.num_shards)).astype(int))
    records = np.concatenate([shard_set.records(shard) for shard in chosen.tolist()])
    sides = np.stack([records["width"], records["height"]], axis=1).astype(np.int64)
    sides = sides[sides.min(axis=1) > 0]
    if not len(sides):
        return []
    pixels = sides.prod(axis=1)
    middle = np.median(sides, axis=0).astype(int)
    smallest, largest = sides[pixels.argmin()], sides[pixels.argmax()]
    sizes = f"median {_size(middle)}, smallest {_size(smallest)}, largest {_size(largest)} pixels"
    sizes = sizes if pixels.min() < pixels.max() else f"all {_size(middle)} pixels"
    lines = [f"sizes{_share_text(len(records), shard_set)}: {sizes}"]
    picked = spread(shard_set, _SAMPLED_REMOTE if shard_set.is_remote else _SAMPLED)
    kinds = Counter(_kind_of(shard_set, *place) for place in picked)
    ranked = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    lines.append(f"formats{_share_text(len(picked), shard_set)}: {ranked}")
    if shard_set.pixels.is_rgb and any("16 bits" in kind for kind in kinds):
        lines.append("images of 16 bits were packed as 8-bit RGB; --channels 1 --dtype uint16 keeps their values")
    if np.median(pixels) > _LARGE_PIXELS:
        # values other than 8-bit RGB are never resized
        advice = (
            "--max-side 512 packs them at a size that suits crops of 224 pixels" if shard_set.pixels.is_rgb else
            "--tiles 512 cuts them, or crops.window reads a part of each TIFF in training"
        )  # fmt: skip
        lines.append(f"large images: decoding them can take longer than training on them; {advice}")
    return lines


def count_reasons(rejected: bytes) -> Counter[str]:
    """Return how many images and maps of a ``rejected.jsonl`` have each reason, without sizes and advice."""
    counts: Counter[str] = Counter()
    for line in rejected.splitlines():
        try:
            reason = str(json.loads(line)["reason"])
        except (ValueError, TypeError, KeyError):
            reason = "unknown reason"
        # the numbers of a pixel format remain, such as 4 channels of uint16
        counts[re.sub(r"(?<!uint)(?<!float)(?<![0-9])[0-9]+(?![0-9])(?! channel)", "N", reason.partition("; ")[0])] += 1
    return counts


def describe_rejected(reasons: Counter[str], log: str) -> list[str]:
    """Return lines about rejected images and maps: the most frequent reasons, and the path ``log`` of their list."""
    lines = []
    for what, is_map in (("image", False), ("map", True)):
        chosen = Counter({text: count for text, count in reasons.items() if text.startswith(LEFT_OUT) == is_map})
        if not chosen:
            continue
        shown = chosen.most_common(_SHOWN_REASONS)
        lines.append(f"rejected {counted(chosen.total(), what)}, listed in {log}:")
        lines += [f"  {count} x {reason}" for reason, count in shown]
        if others := chosen.total() - sum(count for _, count in shown):
            lines.append(f"  {others} x other reasons")
    return lines


def contact_sheet(shard_set: ShardSet, classes: Sequence[str], count: int = 48) -> bytes:
    """Draw images of a set as training sees them, spread over it, with their class names, as a PNG.

    Raises:
        ShardError, OSError: the set cannot be read.
    """
    tiles = []
    for shard, sample in spread(shard_set, count):
        label = int(shard_set.record(shard, sample)["label"])
        try:
            values = decode(shard_set.read(shard, sample), pixels=shard_set.pixels)
            image = Image.fromarray(to_rgb8(values, _shown_ranges(shard_set.manifest)))
        except ShardError:
            continue
        image = ImageOps.contain(image, (_TILE, _TILE), Image.Resampling.LANCZOS)
        named = 0 <= label < len(classes)
        tiles.append((image, classes[label] if named else "" if label == NO_LABEL else f"label {label}"))
    columns = min(_COLUMNS, max(len(tiles), 1))
    rows = -(-len(tiles) // columns)
    step = (_TILE + _GAP, _TILE + _CAPTION + _GAP)
    page = Image.new("RGB", (columns * step[0] + _GAP, rows * step[1] + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default()
    for number, (image, name) in enumerate(tiles):
        left, top = _GAP + number % columns * step[0], _GAP + number // columns * step[1]
        page.paste(image, (left + (_TILE - image.width) // 2, top + (_TILE - image.height) // 2))
        draw.text((left, top + _TILE + 2), _shorten(printable(name), font), _INK, font)
    content = io.BytesIO()
    page.save(content, "PNG")
    return content.getvalue()


def _share_text(count: int, shard_set: ShardSet) -> str:
    return "" if count == shard_set.num_samples else f" of {count} images, spread over the set"


def spread(shard_set: ShardSet, count: int) -> list[tuple[int, int]]:
    """Return (shard, sample) of at most ``count`` images, evenly spread over the set."""
    ends = np.cumsum(shard_set.sizes)
    total = int(ends[-1])
    numbers = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))
    shards = np.searchsorted(ends, numbers, side="right")
    samples = numbers - (ends - shard_set.sizes)[shards]
    return list(zip(shards.tolist(), samples.tolist(), strict=True))


def _kind_of(shard_set: ShardSet, shard: int, sample: int) -> str:
    """Return the format and the channels of an image."""
    try:
        payload = shard_set.read(shard, sample)
        if not shard_set.pixels.is_rgb:
            return f"{shard_set.pixels}"
        name = find_format(payload)
        mode = open_as(name, payload).mode
    except ShardError:
        return "unreadable"
    return f"{name} {_CHANNELS.get(mode, mode)}"


def _shown_ranges(manifest: SetManifest) -> list[tuple[float, float]]:
    """Return the values of black and white: nearly all values of each channel if they are known."""
    if manifest.pixels.is_rgb or manifest.statistics is None:
        return [VALUE_RANGES[manifest.pixels.dtype]]
    rows = manifest.statistics.percentiles
    return [(low, max(high, low + 1e-6)) for low, high in zip(rows["1"], rows["99"], strict=True)]


def _size(sides: np.ndarray) -> str:
    return f"{sides[0]} x {sides[1]}"


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the beginning of a text that is as wide as a tile."""
    if font.getlength(text) <= _TILE:
        return text
    return next((f"{part}..." for part in _prefixes(text) if font.getlength(f"{part}...") <= _TILE), "")


def _prefixes(text: str) -> Iterator[str]:
    return (text[:length] for length in range(min(len(text), 200), 0, -1))
