"""Images with a map of class ids or of depth each, in a parallel folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError, printable
from shards.format.decode import WHITE
from shards.format.label_maps import UNLABELLED, decode_class_ids, decode_depth
from shards.format.pixels import PixelFormat
from shards.packing.items import FileSpan
from streamtrain.data.still_images import centre_crop, centre_spans, still_size
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.features import decode_crop
from streamtrain.evaluation.images import LabelledImages, open_source, split_indices

Array = npt.NDArray[np.int16] | npt.NDArray[np.float32]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MapKind:
    """A kind of map: how to decode a file of it, its suffixes, and the value of a pixel without a label."""

    decode: Callable[[bytes], Array]
    suffixes: tuple[str, ...]
    missing: int


CLASS_IDS = MapKind(decode_class_ids, (".png",), UNLABELLED)
DEPTH = MapKind(decode_depth, (".npy", ".png"), 0)


@dataclass(frozen=True)
class MappedImages:
    """N images with a map each.

    Attributes:
        images: without labels of their own.
        paths: of the maps.
        ignored: class ids of pixels that count as unlabelled.
    """

    images: LabelledImages
    paths: tuple[Path, ...]
    kind: MapKind
    ignored: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: np.ndarray, name: str) -> MappedImages:
        paths = tuple(self.paths[index] for index in indices.tolist())
        return replace(self, images=self.images.subset(indices, name), paths=paths)

    def crop(self, index: int, resize: int, size: int) -> tuple[np.ndarray, Array | None]:
        """Return the centre crops of an image [size, size, channels] and its map [size, size].

        The map is resampled to the nearest value. It is None, and the image grey, if the image is unusable.

        Raises:
            StreamtrainError: the map cannot be read, or has another aspect than the image; names its file.
        """
        image = self.images.decode_if_usable(index)
        if image is None:
            return decode_crop(self.images, index, resize, size)[0], None
        values, (width, height) = self.read_map(index), still_size(image)
        rows, columns = values.shape
        # a map of another resolution has the same aspect but for the rounding of a side
        if abs(columns * height - width * rows) > max(columns, rows, width, height):
            raise StreamtrainError(
                f"{printable(self.paths[index])} has {columns}x{rows} pixels, its image {width}x{height}: the shape "
                "must be the same; make the map for the upright image"
            )
        left_right, top_bottom = centre_spans(width, height, resize, size)
        across = _nearest(*left_right, size, columns / width, columns)
        down = _nearest(*top_bottom, size, rows / height, rows)
        return centre_crop(image, resize, size), values[down[:, None], across]

    def read_map(self, index: int) -> Array:
        """Return the map of an image [height, width]; raises StreamtrainError."""
        path = self.paths[index]
        try:
            values = self.kind.decode(FileSpan(path).read())
        except ShardError as error:
            raise StreamtrainError(f"cannot use {printable(path)}: {error}") from None
        return np.where(np.isin(values, self.ignored), values.dtype.type(self.kind.missing), values)


def open_mapped(
    path: Path, maps: Path, kind: MapKind, pixels: PixelFormat, ignored: Sequence[int] = ()
) -> MappedImages:
    """Open a folder of images, at any depth, and their maps: ``maps/A/B.png`` for ``path/A/B.jpg``.

    Images without a map are left out, with a warning.

    Raises:
        StreamtrainError: a folder is missing or is a shard set, or no image has a map.
    """
    if (path / "manifest.json").is_file():
        raise StreamtrainError(f"{path} is a shard set; give the folder of its images, beside --labels")
    if not maps.is_dir():
        raise StreamtrainError(f"--labels {maps} is not a folder; give the folder of the label files")
    if not path.is_dir():
        raise StreamtrainError(f"{path} is not a folder: give the folder of the images, beside --labels")
    images = open_source(str(path), WHITE, pixels)
    found: list[int] = []
    paths: list[Path] = []
    missing: list[str] = []
    for index in range(len(images)):
        name = images.sample_key(index)
        options = [maps / Path(name).with_suffix(suffix) for suffix in kind.suffixes]
        existing = next((option for option in options if option.is_file()), None)
        if existing is None:
            missing.append(f"{path / name} needs {' or '.join(map(str, options))}")
        else:
            found.append(index)
            paths.append(existing)
    if not found:
        raise StreamtrainError(printable(f"no image of {path} has a label file: {missing[0]}"))
    if missing:
        logger.warning(
            "%d of %d images of %s have no label file and are left out: %s",
            len(missing), len(images), path, printable(missing[0]),
        )  # fmt: skip
    return MappedImages(images.subset(np.array(found), images.name), tuple(paths), kind, tuple(ignored))


def split_mapped(mapped: MappedImages) -> tuple[MappedImages, MappedImages]:
    """Split like ``split_images``."""
    train, test = split_indices(mapped.images)[0]
    return mapped.subset(train, f"4/5 of {mapped.images.name}"), mapped.subset(test, f"1/5 of {mapped.images.name}")


def _nearest(start: float, end: float, size: int, scale: float, length: int) -> npt.NDArray[np.int64]:
    """Return the indices [size] below ``length`` nearest to the pixels of a crop; ``scale``: map pixels per pixel."""
    centres = (start + (np.arange(size) + 0.5) * ((end - start) / size)) * scale
    return np.clip(centres.astype(np.int64), 0, length - 1)
