"""Files of image pairs with corresponding points, one JSON object per line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import printable
from streamtrain.errors import StreamtrainError

# bounds of a file from an unknown source
MAX_FILE_BYTES, MAX_LINE_BYTES, MAX_PAIRS, MAX_POINTS = 2**28, 2**20, 200_000, 1_000
_REQUIRED = ("image_a", "image_b", "points_a", "points_b")
_KEYS = (*_REQUIRED, "box_b")

Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImagePair:
    """Two images and P points of each, in pixels (x, y) of the upright image from its top left corner.

    Attributes:
        source: file and line, for messages.
        image_a, image_b: paths.
        points_a, points_b: float64 [P, 2], in the same order.
        box_b: (left, top, right, bottom) of the object in image B, float64 [4]; None: the whole image.
    """

    source: str
    image_a: Path
    image_b: Path
    points_a: Points
    points_b: Points
    box_b: npt.NDArray[np.float64] | None


def read_pairs(path: Path) -> list[ImagePair]:
    """Read a file of pairs, whose image paths are relative to the file's folder, and check that the images exist.

    Raises:
        StreamtrainError: the file, a line or an image cannot be used; names the line.
    """
    if not path.is_file():
        reason = "is not a file" if path.exists() else "does not exist"
        raise StreamtrainError(f"--pairs {path} {reason}; give a file with a JSON object for each pair of images")
    pairs: list[ImagePair] = []
    existing: set[Path] = set()
    num_bytes = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                source, num_bytes = f"{printable(path)}, line {number}", num_bytes + len(line)
                if len(line) > MAX_LINE_BYTES:
                    raise StreamtrainError(f"{source} has more than {MAX_LINE_BYTES} bytes; give each pair a line")
                if not line.strip():
                    continue
                if len(pairs) == MAX_PAIRS or num_bytes > MAX_FILE_BYTES:
                    limit = f"{MAX_PAIRS} pairs or {MAX_FILE_BYTES} bytes"
                    raise StreamtrainError(f"{source}: the file has more than {limit}; split it")
                pairs.append(_parse_pair(line, path.parent, source))
                _require_files(pairs[-1], existing)
    except OSError as error:
        raise StreamtrainError(f"cannot read --pairs {path}: {error.strerror or error}") from None
    if not pairs:
        raise StreamtrainError(f"--pairs {path} is empty; give it a JSON object for each pair of images")
    return pairs


def _parse_pair(line: bytes, folder: Path, source: str) -> ImagePair:
    try:
        record = json.loads(line)
    # RecursionError: deep nesting
    except (ValueError, RecursionError):
        raise StreamtrainError(f"{source} is not a JSON object; keys are {', '.join(_KEYS)}") from None
    if not isinstance(record, dict):
        raise StreamtrainError(f"{source} is not a JSON object; keys are {', '.join(_KEYS)}")
    if missing := [key for key in _REQUIRED if key not in record]:
        raise StreamtrainError(f"{source} lacks {', '.join(missing)}")
    if unknown := [key for key in record if key not in _KEYS]:
        raise StreamtrainError(f"{source}: unknown key {printable(unknown[0])[:80]!r}; keys are {', '.join(_KEYS)}")
    images = [record["image_a"], record["image_b"]]
    for image in images:
        if not isinstance(image, str) or not image:
            raise StreamtrainError(f"{source}: image_a and image_b must be paths relative to the file")
    points_a, points_b = (_numbers(record[key], 2, f"{source}: {key}") for key in ("points_a", "points_b"))
    if len(points_a) != len(points_b):
        raise StreamtrainError(f"{source} has {len(points_a)} points_a and {len(points_b)} points_b; give pairs")
    box = record.get("box_b")
    if box is not None:
        box = _numbers([box], 4, f"{source}: box_b")[0]
        if box[2] <= box[0] or box[3] <= box[1]:
            raise StreamtrainError(f"{source}: box_b must be [left, top, right, bottom], with left below right")
    return ImagePair(source, folder / images[0], folder / images[1], points_a, points_b, box)


def _numbers(value: Any, width: int, what: str) -> npt.NDArray[np.float64]:
    """Return a list of lists of ``width`` finite numbers as float64 [N, width]."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_POINTS:
        raise StreamtrainError(f"{what} must be a list of 1 to {MAX_POINTS} points [x, y]")
    for row in value:
        # bool is an int; float() raises OverflowError for a large int
        if not (
            isinstance(row, list)
            and len(row) == width
            and all(type(number) in (int, float) and abs(number) < 1e9 and math.isfinite(number) for number in row)
        ):
            kind = "[x, y]" if width == 2 else "[left, top, right, bottom]"
            raise StreamtrainError(f"{what}: {printable(json.dumps(row))[:80]} is not {kind} in finite pixels")
    return np.array(value, np.float64)


def _require_files(pair: ImagePair, existing: set[Path]) -> None:
    """Raise StreamtrainError unless both images are files; ``existing`` are known to be, and is extended."""
    for image in (pair.image_a, pair.image_b):
        if image not in existing:
            try:
                is_file = image.is_file()
            except (OSError, ValueError):
                is_file = False
            if not is_file:
                raise StreamtrainError(
                    f"{pair.source}: there is no image {printable(image)[:500]}; paths are relative to the file"
                )
            existing.add(image)


def check_inside(pair: ImagePair, size_a: tuple[int, int], size_b: tuple[int, int]) -> None:
    """Raise StreamtrainError if a point or the box is outside its image; sizes are (width, height)."""
    corners = np.zeros((0, 2)) if pair.box_b is None else pair.box_b.reshape(2, 2)
    for name, points, size in (
        ("points_a", pair.points_a, size_a), ("points_b", pair.points_b, size_b), ("box_b", corners, size_b),
    ):  # fmt: skip
        if (is_outside := ((points < 0) | (points > size)).any(1)).any():
            x, y = points[is_outside.argmax()]
            raise StreamtrainError(
                f"{pair.source}: ({x:g}, {y:g}) of {name} is outside the upright image of {size[0]}x{size[1]} pixels"
            )
