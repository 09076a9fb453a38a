"""Images with a map of class ids or of depth each, in a parallel folder or in the same shard set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError, printable
from shards.format.decode import WHITE
from shards.format.label_maps import CLASS_IDS as CLASS_IDS
from shards.format.label_maps import DEPTH as DEPTH
from shards.format.label_maps import Array as Array
from shards.format.label_maps import MapKind
from shards.format.pixels import PixelFormat
from shards.packing.items import FileSpan
from shards.packing.maps import describe_map_files, find_map_files
from streamtrain.data.still_images import centre_crop, centre_spans, still_size
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.features import decode_crop
from streamtrain.evaluation.images import LabelledImages, open_source, split_indices

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MappedImages:
    """N images with a map each.

    Attributes:
        images: without labels of their own.
        read: returns the encoded bytes of the map of image i, and its name for messages.
        ignored: class ids of pixels that count as unlabelled.
    """

    images: LabelledImages
    read: Callable[[int], tuple[bytes, str]]
    kind: MapKind
    ignored: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: np.ndarray, name: str) -> MappedImages:
        return replace(self, images=self.images.subset(indices, name), read=lambda i: self.read(int(indices[i])))

    def crop(self, index: int, resize: int, size: int) -> tuple[np.ndarray, Array | None]:
        """Return the centre crops of an image [size, size, channels] and its map [size, size].

        The map is resampled to the nearest value. It is None, and the image grey, if the image is unusable.

        Raises:
            StreamtrainError: the map cannot be read, or has another shape than the image; names it.
        """
        image = self.images.decode_if_usable(index)
        if image is None:
            return decode_crop(self.images, index, resize, size)[0], None
        width, height = still_size(image)
        values = self.read_map(index, width, height)
        return centre_crop(image, resize, size), crop_map(values, (width, height), resize, size)

    def read_map(self, index: int, width: int, height: int) -> Array:
        """Return the map of an image of ``width`` x ``height`` pixels [rows, columns]; raises StreamtrainError."""
        name = f"the {self.kind.title} of image {index} of {self.images.name}"
        try:
            payload, name = self.read(index)
            values = self.kind.decode_for(payload, width, height)
        except ShardError as error:
            raise StreamtrainError(printable(f"cannot use {name}: {error}")) from None
        return np.where(np.isin(values, self.ignored), values.dtype.type(self.kind.missing), values)


def open_mapped(
    path: Path, maps: Path | None, kind: MapKind, pixels: PixelFormat, ignored: Sequence[int] = ()
) -> MappedImages:
    """Open a folder of images, at any depth, and their maps, or a shard set that was packed with maps.

    Images without a map are left out, with a warning.

    Args:
        maps: folder of the maps, ``maps/A/B.png`` for ``path/A/B.jpg``; None for a shard set.

    Raises:
        StreamtrainError: a folder is missing, or no image has a map.
        ShardError: a set cannot be read.
    """
    if (path / "manifest.json").is_file():
        if maps is not None:
            raise StreamtrainError(
                f"{path} is a shard set, whose maps are in the set; remove --labels, or give the folder of its images"
            )
        images = open_source(str(path), WHITE, pixels)
        images.require_pixels(pixels)
        mapped = mapped_images(images, kind, ignored)
        if mapped is None:
            raise StreamtrainError(f"{path} has no {kind.title}s; pack it with --{kind.name} DIR")
        if num_missing := len(images) - len(mapped):
            logger.warning(
                "%d of %d images of %s have no %s and are left out", num_missing, len(images), path, kind.title
            )
        return mapped
    if maps is None:
        raise StreamtrainError(
            f"{path} is not a shard set with {kind.title}s; give the folder of the {kind.title}s with --labels"
        )
    if not maps.is_dir():
        raise StreamtrainError(f"--labels {maps} is not a folder; give the folder of the label files")
    if not path.is_dir():
        raise StreamtrainError(f"{path} is not a folder: give the folder of the images, beside --labels")
    images = open_source(str(path), WHITE, pixels)
    names = [images.sample_key(index) for index in range(len(images))]
    files, _ = find_map_files(names, maps, kind)
    found = [index for index, file in enumerate(files) if file is not None]
    paths = [file for file in files if file is not None]
    if num_missing := len(names) - len(found):
        name = names[files.index(None)]
        needed = printable(f"{path / name} needs {describe_map_files(name, maps, kind)}")
        if not found:
            raise StreamtrainError(f"no image of {printable(path)} has a label file: {needed}")
        logger.warning(
            "%d of %d images of %s have no label file and are left out: %s", num_missing, len(names), path, needed
        )

    def read(index: int) -> tuple[bytes, str]:
        return FileSpan(paths[index]).read(), str(paths[index])

    return MappedImages(images.subset(np.array(found), images.name), read, kind, tuple(ignored))


def mapped_images(images: LabelledImages, kind: MapKind, ignored: Sequence[int] = ()) -> MappedImages | None:
    """Return the images of a shard set that have a map of a kind; None if there are none. Raises ShardError."""
    if images.maps is None:
        return None
    found = np.flatnonzero(images.maps.exist(kind.name))
    if not len(found):
        return None
    maps = images.maps

    def read(index: int) -> tuple[bytes, str]:
        return maps.read(kind.name, int(found[index]))

    return MappedImages(images.subset(found, images.name), read, kind, tuple(ignored))


def split_mapped(mapped: MappedImages) -> tuple[MappedImages, MappedImages]:
    """Split like ``split_images``."""
    train, test = split_indices(mapped.images)[0]
    return mapped.subset(train, f"4/5 of {mapped.images.name}"), mapped.subset(test, f"1/5 of {mapped.images.name}")


def crop_map(values: Array, image: tuple[int, int], resize: int, size: int) -> Array:
    """Return the part [size, size] of a map that the centre crop shows, resampled to the nearest value.

    Args:
        image: width and height of the image.
    """
    (rows, columns), (width, height) = values.shape, image
    left_right, top_bottom = centre_spans(width, height, resize, size)
    across = _nearest(*left_right, size, columns / width, columns)
    down = _nearest(*top_bottom, size, rows / height, rows)
    cropped: Array = values[down[:, None], across]
    return cropped


def _nearest(start: float, end: float, size: int, scale: float, length: int) -> npt.NDArray[np.int64]:
    """Return the indices [size] below ``length`` nearest to the pixels of a crop; ``scale``: map pixels per pixel."""
    centres = (start + (np.arange(size) + 0.5) * ((end - start) / size)) * scale
    return np.clip(centres.astype(np.int64), 0, length - 1)
