"""Decoding the items of a packing in worker processes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

from shards.errors import ShardError
from shards.format import images
from shards.packing.items import Item, SourceUnreachable
from shards.packing.maps import PreparedMap, prepare_maps
from shards.packing.options import PackOptions
from shards.packing.parallel import ordered_map
from shards.packing.tiles import close_images, prepare_tile

_ITEMS_PER_TASK = 16


@dataclass(frozen=True)
class Outcome:
    """Result of a worker for one item: an image, or the reason for its rejection."""

    image: images.PreparedImage | None
    reason: str
    content: str  # hash of the source's bytes, or of the stored tile, with ``dedup``
    is_background: bool = False  # a tile that is skipped
    maps: tuple[PreparedMap, ...] = ()
    left_out: tuple[str, ...] = ()  # reasons why other maps of the image are not packed


def prepare_all(items: Sequence[Item], options: PackOptions, workers: int) -> Generator[Outcome, None, None]:
    """Yield the outcome of each item in order; close the generator to stop early."""
    size = options.tiles.per_task(options.pixels) if options.tiles else _ITEMS_PER_TASK
    tasks = (items[first : first + size] for first in range(0, len(items), size))
    try:
        with closing(ordered_map(partial(_prepare, options), tasks, workers)) as results:
            for outcomes in results:
                yield from outcomes
    finally:
        close_images()


def _prepare(options: PackOptions, items: Sequence[Item]) -> list[Outcome]:
    with images.tolerant_pillow():
        return [_prepare_one(item, options) for item in items]


def _prepare_one(item: Item, options: PackOptions) -> Outcome:
    content = ""
    try:
        if options.tiles:
            image = prepare_tile(item, options.tiles, options.pixels, options.max_pixels)
            if image is None:
                return Outcome(None, "", "", is_background=True)
            return Outcome(image, "", _hash(image.payload) if options.dedup else "")
        payload = item.location.read()
        if options.dedup:
            content = _hash(payload)
        image = images.prepare(
            payload,
            max_side=options.max_side,
            max_pixels=options.max_pixels,
            quality=options.quality,
            upright=options.upright,
            pixels=options.pixels,
        )
    except SourceUnreachable:
        raise
    except ShardError as error:
        return Outcome(None, str(error), content)
    return Outcome(image, "", content, False, *prepare_maps(item, image.width, image.height))


def _hash(payload: bytes) -> str:
    return blake2b(payload, digest_size=16).hexdigest()
