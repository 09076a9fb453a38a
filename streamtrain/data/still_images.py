"""Single images for evaluation and inference: decode with Pillow, resize, centre crop."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from streamtrain.errors import StreamtrainError


def decode_image(source: Path | bytes, name: str | Path) -> Image.Image:
    """Return an image file, or its encoded bytes, as RGB with the EXIF orientation applied; errors call it ``name``.

    Raises:
        StreamtrainError: if the image is missing or cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return upright_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise StreamtrainError(f"cannot read the image {name}: {error}") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")


def centre_crop(image: Image.Image, resize: int, size: int) -> np.ndarray:
    """Resize the shorter side to ``resize`` pixels (bicubic) and return the central square: uint8 [size, size, 3]."""
    side = size / resize * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    # resample the square only; its margin is never computed
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
