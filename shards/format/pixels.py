"""The kind of pixels of a shard set: number of channels and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# with the range of values that is shown from black to white, and normalised to 0..1, by default
VALUE_RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0), "float32": (0.0, 1.0)}
DTYPES = tuple(VALUE_RANGES)
MAX_CHANNELS = 512

Range = tuple[float, float]


@dataclass(frozen=True)
class PixelFormat:
    """Number of channels and dtype, one of ``DTYPES``, that all images of a set have."""

    channels: int = 3
    dtype: str = "uint8"

    def __str__(self) -> str:
        return f"{self.channels} {'channel' if self.channels == 1 else 'channels'} of {self.dtype}"

    @property
    def is_rgb(self) -> bool:
        """Whether images are converted to 8-bit RGB; all other sets keep the stored values."""
        return self == RGB

    @property
    def num_bytes(self) -> int:
        """Bytes of a decoded pixel."""
        return self.channels * {"uint8": 1, "uint16": 2, "float32": 4}[self.dtype]

    @property
    def crop_bytes(self) -> int:
        """Bytes of a pixel of a crop: uint8 stays uint8, other values become float32."""
        return self.channels * (1 if self.dtype == "uint8" else 4)


RGB = PixelFormat()


def to_rgb8(
    values: npt.NDArray[Any], ranges: Sequence[Range], channels: Sequence[int] | None = None
) -> npt.NDArray[np.uint8]:
    """Return [..., num_channels] as uint8 [..., 3], to be shown.

    Args:
        ranges: the values of black and white, one pair for all channels or one per channel.
        channels: one or three, shown as grey or as red, green and blue; None: the first three, or the first of fewer.
    """
    count = values.shape[-1]
    chosen = list(channels) if channels is not None else [0, 1, 2] if count >= 3 else [0]
    if values.dtype == np.uint8 and chosen == list(range(count)) and count == 3 and set(ranges) == {(0, 255)}:
        return values
    low, high = np.array(ranges if len(ranges) > 1 else list(ranges) * count, np.float32)[chosen].T
    shown = (values[..., chosen].astype(np.float32) - low) / (high - low) * 255
    shown = np.rint(np.clip(shown, 0, 255)).astype(np.uint8)
    return shown if len(chosen) == 3 else np.repeat(shown, 3, axis=-1)
