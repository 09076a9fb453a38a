"""Single images for evaluation and inference: decode as training does, resize, centre crop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.errors import ShardError
from shards.format.decode import WHITE, Color, decode, to_rgb, wrap_pillow
from shards.format.images import MAX_BYTES
from shards.format.pixels import RGB, PixelFormat, Range, to_rgb8
from streamtrain.errors import StreamtrainError

# 8-bit RGB, or [height, width, channels] of the values of another pixel format
Still = Image.Image | npt.NDArray[Any]


def decode_image(
    source: Path | bytes, name: str | Path, background: Color | None = WHITE, pixels: PixelFormat = RGB
) -> Still:
    """Return an image file, or its encoded bytes, upright; errors call it ``name``.

    Args:
        background: colour that transparent RGB images are composited on; None drops the alpha channel.
        pixels: as ``decode``.

    Raises:
        StreamtrainError: if the image is missing or cannot be decoded.
    """
    try:
        payload = source if isinstance(source, bytes) else _read(source)
        values = decode(payload, background=background, pixels=pixels)
        return Image.fromarray(values) if pixels.is_rgb else values
    except OSError as error:
        raise StreamtrainError(f"cannot read the image {name}: {error.strerror or error}") from None
    except ShardError as error:
        raise StreamtrainError(f"cannot read the image {name}: {error}") from None


def upright_rgb(image: Image.Image, background: Color | None = WHITE) -> Image.Image:
    """Return an image that Pillow has opened as ``decode_image`` returns a file."""
    try:
        return Image.fromarray(to_rgb(wrap_pillow(image), background))
    except ShardError as error:
        raise StreamtrainError(f"cannot use the image: {error}") from None


def _read(path: Path) -> bytes:
    if not path.is_file():
        # opening a named pipe would block until another process writes to it
        raise StreamtrainError(
            f"cannot read the image {path}: {'not a file' if path.exists() else 'it does not exist'}"
        )
    with open(path, "rb") as file:
        payload = file.read(MAX_BYTES + 1)
    if len(payload) > MAX_BYTES:
        raise StreamtrainError(f"cannot read the image {path}: it has more than {MAX_BYTES} bytes")
    return payload


def still_size(image: Still) -> tuple[int, int]:
    """Return (width, height)."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def resize_still(image: Still, size: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> Still:
    """Resize (bicubic) a box, or all, of an image to (width, height); arrays become uint8 or float32."""
    if isinstance(image, Image.Image):
        return image.resize(size, Image.Resampling.BICUBIC, box=box)
    values = image if image.dtype == np.uint8 else image.astype(np.float32)
    planes = (Image.fromarray(values[..., channel]) for channel in range(values.shape[2]))
    return np.stack([np.asarray(plane.resize(size, Image.Resampling.BICUBIC, box=box)) for plane in planes], -1)


def as_picture(image: Still, ranges: Sequence[Range], channels: Sequence[int] | None = None) -> Image.Image:
    """Return an image as RGB, to be shown; arguments as ``to_rgb8``."""
    return image if isinstance(image, Image.Image) else Image.fromarray(to_rgb8(image, ranges, channels))


def centre_spans(width: int, height: int, resize: int, size: int) -> list[tuple[float, float]]:
    """Return (start, end) of ``centre_crop`` in pixels of an image: horizontal, then vertical."""
    spans = []
    for edge in (width, height):
        scaled = int(resize * edge / min(width, height))
        start = (scaled - size) // 2
        spans.append((start * edge / scaled, (start + size) * edge / scaled))
    return spans


def centre_crop(image: Still, resize: int, size: int) -> np.ndarray:
    """Resize the shorter side to ``resize`` pixels (bicubic) and return the central square: [size, size, channels].

    The longer side and the margin before the crop are rounded down to whole pixels, as transformers does, so that an
    exported image processor gives the same pixels, but for rounding.
    """
    (left, right), (top, bottom) = centre_spans(*still_size(image), resize, size)
    # resample the square only; its margin is never computed
    return np.array(resize_still(image, (size, size), (left, top, right, bottom)))
