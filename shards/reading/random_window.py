"""The window of a large image that all views of a sample come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.randomness import WINDOWS, uniforms

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels


@dataclass(frozen=True)
class RandomWindow:
    """Draws one window per slot, of at most ``side`` x ``side`` pixels, uniform over all positions in the image."""

    side: int
    seed: int

    def applies_to(self, width: int, height: int) -> bool:
        """Return whether an image is larger than a window, in either axis."""
        return max(width, height) > self.side

    def draw(self, slot: int, width: int, height: int) -> Box:
        """Return the window of the image at ``slot``; it depends only on (seed, slot) and the size of the image."""
        down, across = uniforms(self.seed, WINDOWS, np.array([slot]), 2)[0].tolist()
        rows, columns = min(self.side, height), min(self.side, width)
        top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
        return top, left, top + rows, left + columns
