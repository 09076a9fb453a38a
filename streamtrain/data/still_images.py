"""Single images for evaluation and inference: decode as training does, resize, centre crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import ShardError
from shards.format.decode import WHITE, Color, decode, to_rgb, wrap_pillow
from shards.format.images import MAX_BYTES
from streamtrain.errors import StreamtrainError


def decode_image(source: Path | bytes, name: str | Path, background: Color | None = WHITE) -> Image.Image:
    """Return an image file, or its encoded bytes, as upright RGB; errors call it ``name``.

    Args:
        background: colour that transparent images are composited on; None drops the alpha channel.

    Raises:
        StreamtrainError: if the image is missing or cannot be decoded.
    """
    try:
        return Image.fromarray(decode(source if isinstance(source, bytes) else _read(source), background=background))
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


def centre_crop(image: Image.Image, resize: int, size: int) -> np.ndarray:
    """Resize the shorter side to ``resize`` pixels (bicubic) and return the central square: uint8 [size, size, 3].

    The longer side and the margin before the crop are rounded down to whole pixels, as transformers does, so that an
    exported image processor gives the same pixels, but for rounding.
    """
    spans = []
    for edge in image.size:
        scaled = int(resize * edge / min(image.size))
        start = (scaled - size) // 2
        spans.append((start * edge / scaled, (start + size) * edge / scaled))
    (left, right), (top, bottom) = spans
    # resample the square only; its margin is never computed
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom)))
