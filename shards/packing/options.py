"""Options of a packing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from shards.format import images
from shards.format.pixels import RGB, PixelFormat
from shards.format.tar_members import MAP_EXTENSIONS
from shards.packing.tiles import Tiling


@dataclass(frozen=True)
class PackOptions:
    """Options that determine the bytes of a set, together with its source."""

    shard_bytes: int = 256_000_000  # maximum size of a tar, except for a single larger image
    max_side: int | None = None  # shrink images to this many pixels on the longer side
    quality: int = images.DEFAULT_QUALITY  # of re-encoded JPEGs
    max_pixels: int = images.DEFAULT_MAX_PIXELS  # reject images with more pixels
    upright: bool = False  # apply an EXIF rotation to the pixels, instead of leaving it to the decoder
    shuffle: int | None = None  # seed: pack in random order
    dedup: bool = False  # leave out images with the same bytes as an earlier one
    pixels: PixelFormat = RGB  # keep values of these channels and dtype; images of another kind are rejected
    tiles: Tiling | None = None  # cut images into tiles
    seg: Path | str | None = None  # folder of masks of class ids, of the same relative names as the images
    depth: Path | str | None = None  # folder of depth maps, likewise

    @property
    def map_folders(self) -> dict[str, Path]:
        """Folders of maps, by the kind of map."""
        return {kind: Path(folder) for kind in MAP_EXTENSIONS if (folder := getattr(self, kind)) is not None}

    def identity(self) -> dict[str, object]:
        """Return the fields for the fingerprint; newer fields are omitted at their default, as earlier versions do.

        Maps are omitted too: each belongs to the identity of its image.
        """
        omitted = {"seg", "depth"} | ({"pixels"} if self.pixels.is_rgb else set())
        omitted |= set() if self.tiles else {"tiles"}
        return {name: value for name, value in asdict(self).items() if name not in omitted}
