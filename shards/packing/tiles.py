"""Cutting large images into tiles of one size.

The sizes of all images are read first, so every tile is an item of the packing: tiles are decoded by any worker, in any
order, and a packing resumes at any tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from shards.errors import ShardError
from shards.format import images
from shards.format.image_header import MAX_SIDE
from shards.format.imagery import MAX_DECODED_BYTES
from shards.format.images import PreparedImage
from shards.format.pixels import VALUE_RANGES, PixelFormat
from shards.format.windows import Image, open_image
from shards.packing.items import MAX_ITEMS, FileSpan, Inputs, Item, Location, Refused, SourceUnreachable
from shards.packing.parallel import ordered_map
from shards.progress import bar_size

SKIPPED_TILES = "tiles of background, skipped (--tile-contrast 0 keeps them)"
MAX_TILES = 1 << 20  # of one image
_MIN_SIDE = 16
_DEFAULT_CONTRAST = {"uint8": 0.02}
# other types may use a small part of their range: only tiles that are nearly constant are background
_OTHER_CONTRAST = 0.0001
_IMAGES_PER_TASK = 16
_TASK_BYTES = 32 << 20  # of decoded tiles


@dataclass(frozen=True)
class Tiling:
    """How images are cut.

    Attributes:
        side: height and width of a tile in pixels. The last tiles of a row or column are shifted inwards; an image that
            is smaller is one tile.
        overlap: pixels that neighbouring tiles share.
        contrast: share of the value range. A tile is background, and skipped, if the difference between the 1st and the
            99th percentile is smaller in every channel. 0 keeps all; None is 0.02 for uint8 and 0.0001 for other types.

    Raises:
        ShardError: a value is outside its range.
    """

    side: int
    overlap: int = 0
    contrast: float | None = None

    def __post_init__(self) -> None:
        if not _MIN_SIDE <= self.side <= MAX_SIDE:
            raise ShardError(f"--tiles {self.side} is not a number of pixels from {_MIN_SIDE} to {MAX_SIDE}")
        if not 0 <= self.overlap < self.side:
            raise ShardError(f"--overlap {self.overlap} is not a number of pixels from 0 to {self.side - 1}")
        if self.contrast is not None and not 0 <= self.contrast <= 1:
            raise ShardError(f"--tile-contrast {self.contrast} is not a share from 0 to 1")

    def count(self, length: int) -> int:
        """Return the number of tiles along a side of an image."""
        return 1 + max(0, -(-(length - self.side) // (self.side - self.overlap)))

    def span(self, number: int, length: int) -> tuple[int, int]:
        """Return the first pixel of a tile along a side of an image, and the one after its last."""
        begin = max(0, min(number * (self.side - self.overlap), length - self.side))
        return begin, min(begin + self.side, length)

    def check(self, pixels: PixelFormat) -> None:
        """Raise a ShardError if one tile has too many bytes."""
        if self.side**2 * pixels.num_bytes > MAX_DECODED_BYTES:
            raise ShardError(f"--tiles {self.side}: a tile of {pixels} has more than {MAX_DECODED_BYTES} bytes")

    def per_task(self, pixels: PixelFormat) -> int:
        """Return how many tiles a worker decodes at once."""
        return max(1, _TASK_BYTES // (self.side**2 * pixels.num_bytes))

    def is_background(self, values: npt.NDArray[Any]) -> bool:
        """Return whether a tile [height, width, channels] has too little contrast."""
        dtype = values.dtype.name
        low, high = VALUE_RANGES[dtype]
        contrast = _DEFAULT_CONTRAST.get(dtype, _OTHER_CONTRAST) if self.contrast is None else self.contrast
        if contrast == 0:
            return False
        limit = contrast * (high - low)
        flat = values.reshape(-1, values.shape[-1])
        for channel in range(flat.shape[1]):
            first, last = np.percentile(flat[:, channel], (1, 99), method="nearest").tolist()
            if last - first >= limit:
                return False
        return True


def cut(
    inputs: Inputs, tiling: Tiling, pixels: PixelFormat, max_pixels: int, workers: int = 1, progress: bool = False
) -> Inputs:
    """Return inputs whose items are tiles, row by row; an image without a readable size stays one, which is refused.

    Raises:
        ShardError: there are too many tiles.
        SourceUnreachable: the source cannot be read.
    """
    chunks = [inputs.items[first : first + _IMAGES_PER_TASK] for first in range(0, len(inputs.items), _IMAGES_PER_TASK)]
    items: list[Item] = []
    counts: list[int] = []  # tiles of each image
    work = ordered_map(partial(_measure, pixels, max_pixels), chunks, min(workers, len(chunks)))
    shown = None if progress else True
    bar = tqdm(work, desc="reading sizes", unit=" tasks", total=len(chunks), disable=shown, **bar_size())
    for chunk, sizes in zip(chunks, bar, strict=True):
        for item, size in zip(chunk, sizes, strict=True):
            if not isinstance(size, str):
                rows, columns = map(tiling.count, size)
                if rows * columns > MAX_TILES:
                    size = f"{rows}x{columns} tiles are more than {MAX_TILES}; use larger --tiles"
            if isinstance(size, str):
                items.append(replace(item, location=Refused(size)))
                counts.append(1)
                continue
            if len(items) + rows * columns > MAX_ITEMS:
                raise ShardError(f"the images have more than {MAX_ITEMS} tiles; use larger --tiles or several sets")
            tiles = product(range(rows), range(columns))
            items += [Item(item.name, item.label, item.location, tile) for tile in tiles]
            counts.append(rows * columns)
    ends = list(accumulate(inputs.runs or [1] * len(counts), initial=0))
    runs = tuple(sum(counts[first:last]) for first, last in pairwise(ends))
    return replace(inputs, items=tuple(items), runs=runs, keeps_runs=True)


def prepare_tile(item: Item, tiling: Tiling, pixels: PixelFormat, max_pixels: int) -> PreparedImage | None:
    """Return what to store of a tile, losslessly; None if it is background.

    Raises:
        ShardError: it cannot be decoded; gives the reason.
        SourceUnreachable: the source cannot be read.
    """
    if item.tile is None:
        item.location.read()  # raises the reason
        raise AssertionError
    try:
        image = _open(item.location, pixels, max_pixels)
        (top, bottom), (left, right) = map(tiling.span, item.tile, (image.height, image.width))
        values = image.read(top, left, bottom, right)
    except SourceUnreachable:
        raise
    except ShardError as error:
        raise ShardError(f"tile {item.tile_name}: {error}") from error
    return None if tiling.is_background(values) else images.encode_exact(values)


def close_images() -> None:
    """Free the image that the latest tile in this process was read from."""
    _open.cache_clear()


def _measure(pixels: PixelFormat, max_pixels: int, items: Sequence[Item]) -> list[tuple[int, int] | str]:
    """Return height and width of each image, or the reason why it has none."""
    sizes: list[tuple[int, int] | str] = []
    with images.tolerant_pillow():
        for item in items:
            try:
                image = _open_new(item.location, pixels, max_pixels)
            except SourceUnreachable:
                raise
            except ShardError as error:
                sizes.append(str(error))
            else:
                sizes.append((image.height, image.width))
    return sizes


def _open_new(location: Location, pixels: PixelFormat, max_pixels: int) -> Image:
    if isinstance(location, FileSpan):
        return open_image(location.num_bytes(), location.read_part, pixels, max_pixels)
    payload = location.read()
    return open_image(len(payload), lambda begin, end: payload[begin:end], pixels, max_pixels)


_open = lru_cache(maxsize=1)(_open_new)  # for the image's other tiles
