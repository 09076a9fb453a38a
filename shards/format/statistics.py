"""Statistics of the values of a set's images, per channel, in stored units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.format.pixels import PixelFormat

PERCENTILES = (0, 1, 50, 99, 100)
_FLOAT_KEYS = 1 << 16


@dataclass(frozen=True)
class Statistics:
    """Mean, population standard deviation and percentiles of each channel, over all pixels of ``images`` images."""

    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    percentiles: dict[str, tuple[float, ...]]  # by percentage; those of float32 are accurate to 1 %

    @classmethod
    def parse(cls, content: Any, pixels: PixelFormat) -> Statistics:
        """Return the statistics in a manifest; raises TypeError, KeyError or ValueError if they are invalid."""
        rows = {percent: tuple(map(float, content["percentiles"][str(percent)])) for percent in PERCENTILES}
        found = cls(
            int(content["images"]), tuple(map(float, content["mean"])), tuple(map(float, content["std"])),
            {str(percent): row for percent, row in rows.items()},
        )  # fmt: skip
        for row in (found.mean, found.std, *rows.values()):
            if len(row) != pixels.channels or not all(map(math.isfinite, row)):
                raise ValueError(f"statistics of {pixels} are {list(row)}")
        return found


@dataclass(frozen=True)
class Moments:
    """Mean and population standard deviation of each channel, in stored units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_mixture(cls, parts: Sequence[Statistics], weights: Sequence[float]) -> Moments:
        """Return the moments of a mixture of sets of equal channels, by the law of total variance.

        Args:
            weights: share of each set, of any scale.
        """
        shares = np.array(weights, np.float64)[:, None] / np.sum(weights)
        means, deviations = (np.array([getattr(part, name) for part in parts]) for name in ("mean", "std"))
        mean = (shares * means).sum(0)
        variance = (shares * (deviations**2 + (means - mean) ** 2)).sum(0)
        return cls(tuple(mean.tolist()), tuple(np.sqrt(variance).tolist()))


class StatisticsBuilder:
    """Accumulates the statistics of images in one pass and bounded memory; the order of the images does not matter."""

    def __init__(self, pixels: PixelFormat) -> None:
        self.pixels = pixels
        self.num_images = 0
        # exact sums of float32 values and of their squares, by channel
        self._sums = [[Fraction()] * pixels.channels for _ in range(2)]
        self._counts = np.zeros((pixels.channels, 256 if pixels.dtype == "uint8" else _FLOAT_KEYS), np.int64)

    def add(self, image: npt.NDArray[Any]) -> None:
        """Add an image [height, width, channels]."""
        self.num_images += 1
        for channel in range(self.pixels.channels):
            values = np.ascontiguousarray(image[..., channel]).ravel()
            if self.pixels.dtype == "float32":
                exact = values.astype(np.float64)
                for sums, value in zip(self._sums, (exact.sum(), (exact * exact).sum()), strict=True):
                    sums[channel] += Fraction(float(value))
                values = _float_keys(values)
            self._counts[channel] += np.bincount(values, minlength=self._counts.shape[1])

    def merge(self, other: StatisticsBuilder) -> None:
        self.num_images += other.num_images
        self._sums = [
            [one + two for one, two in zip(*rows, strict=True)] for rows in zip(self._sums, other._sums, strict=True)
        ]
        self._counts += other._counts

    def result(self) -> Statistics:
        """Return the statistics of the images so far, at least one."""
        keys = np.arange(self._counts.shape[1])
        values = _float_values(keys) if self.pixels.dtype == "float32" else keys.astype(np.float64)
        totals = self._counts.sum(1)
        if self.pixels.dtype == "float32":
            mean, square = np.array([[float(total) for total in sums] for sums in self._sums]) / totals
            variance = np.maximum(square - mean**2, 0)
        else:
            mean = self._counts @ values / totals
            variance = np.array([counts @ (values - m) ** 2 for counts, m in zip(self._counts, mean, strict=True)])
            variance /= totals
        ends = self._counts.cumsum(1)
        rows: dict[str, tuple[float, ...]] = {}
        for percent in PERCENTILES:
            ranks = np.maximum(np.ceil(percent / 100 * totals), 1)
            found = [np.searchsorted(row, rank) for row, rank in zip(ends, ranks, strict=True)]
            rows[str(percent)] = tuple(values[found].tolist())
        return Statistics(self.num_images, tuple(mean.tolist()), tuple(np.sqrt(variance).tolist()), rows)


def _float_keys(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Map float32 to the upper half of its bits, so that keys have the order of the values."""
    bits = values.view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> 16).astype(np.uint16)


def _float_values(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the value next to zero of each key; those of keys without finite values have no meaning."""
    upper = keys.astype(np.uint32) << 16
    bits = np.where(upper >> 31, upper & np.uint32(0x7FFFFFFF), ~(upper | np.uint32(0xFFFF))).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        return bits.view(np.float32).astype(np.float64)
