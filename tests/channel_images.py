"""Images of known values in any number of channels and any dtype; import after ``importorskip("tifffile")``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile

from shards.format.pixels import PixelFormat


def ramp(pixels: PixelFormat, number: int = 0, height: int = 40, width: int = 32) -> np.ndarray:
    """Return [height, width, channels] whose values differ by pixel and channel, over the whole range of integers."""
    size = height * width * pixels.channels
    values = (np.arange(size) + number * 17) * (1 if pixels.dtype == "uint8" else 2749)
    return values.astype(pixels.dtype).reshape(height, width, pixels.channels)


def tiff(values: np.ndarray, path: Path, **options: Any) -> None:
    """Write [height, width, channels]; ``planarconfig`` is ``contig`` or ``separate``."""
    if values.shape[2] == 1:
        options.pop("planarconfig", None)
        values = values[..., 0]
    elif options.setdefault("planarconfig", "contig") == "separate":
        values = values.transpose(2, 0, 1)
    tifffile.imwrite(path, values, photometric="minisblack", metadata=None, **options)


def write_ramps(folder: Path, pixels: PixelFormat) -> int:
    """Write ``ramp`` as every kind of file that can hold it; return their number."""
    folder.mkdir(parents=True)
    values = ramp(pixels)
    np.save(folder / "array.npy", values)
    np.save(folder / "first.npy", values.transpose(2, 0, 1))
    np.save(folder / "swapped.npy", values.astype(values.dtype.newbyteorder(">")))
    tiff(values, folder / "plain.tif")
    tiff(values, folder / "planes.tif", planarconfig="separate")
    for name in ("deflate", "lzw", "zstd"):
        tiff(values, folder / f"{name}.tif", compression=name, tile=(16, 16), predictor=True)
    if pixels.channels in (1, 4) and pixels.dtype != "float32":
        (folder / "image.png").write_bytes(imagecodecs.png_encode(values[..., 0] if pixels.channels == 1 else values))
    return len(list(folder.iterdir()))
