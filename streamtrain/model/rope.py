"""Axial rotary position embedding of patch tokens (Siméoni et al. 2025, section 3.2)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from streamtrain.config.model import ModelConfig
from streamtrain.ops.attention import RopeTable


class Rope:
    """Builds the table of a grid; not a module, so that no engine casts its values to 16 bits."""

    def __init__(self, config: ModelConfig) -> None:
        self.head_dim = config.dim // config.num_heads
        self.base = config.rope_base
        self.num_prefix = 1 + config.num_registers
        self.shift = config.rope_shift
        self.jitter = config.rope_jitter
        self.rescale = config.rope_rescale

    def table(
        self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype, generator: torch.Generator | None
    ) -> RopeTable:
        """Return the table of ``grid``; with a generator (training) the coordinates are augmented as configured."""
        if generator is None or not (self.shift or self.jitter or self.rescale):
            return _cached_table(grid, self.num_prefix, self.head_dim, self.base, device, dtype)
        coordinates = self._augment(patch_centres(grid, device), generator)
        return _table(coordinates, self.num_prefix, self.head_dim, self.base, dtype)

    def _augment(self, coordinates: Tensor, generator: torch.Generator) -> Tensor:
        """Shift both axes uniformly, scale each log-uniformly, then both together, the same for all images."""

        def uniform(count: int, bound: float) -> Tensor:
            draw = torch.rand(count, generator=generator, device=coordinates.device)
            return (2.0 * draw - 1.0) * bound

        if self.shift is not None:
            coordinates = coordinates + uniform(2, self.shift)
        if self.jitter is not None:
            coordinates = coordinates * uniform(2, math.log(self.jitter)).exp()
        if self.rescale is not None:
            coordinates = coordinates * uniform(1, math.log(self.rescale)).exp()
        return coordinates


def patch_centres(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return patch centres (y, x), each axis scaled to [-1, 1]: fp32 ``[num_patches, 2]``, row-major."""
    axes = [2.0 * torch.arange(0.5, size, dtype=torch.float32, device=device) / size - 1.0 for size in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def rope_factors(coordinates: Tensor, num_prefix: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines, fp32 ``[num_prefix + num_patches, head_dim]``, for patches at ``coordinates``.

    The prefix (CLS and registers) is not rotated.
    """
    # fp32 throughout: with 16-bit periods distant patches would get wrong angles
    exponents = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=coordinates.device)
    angles = 2.0 * math.pi * coordinates[:, :, None] * (1 / base**exponents)
    angles = angles.flatten(1)
    cosine, sine = angles.cos(), angles.sin()
    cosine = torch.cat([cosine, cosine], dim=1)
    sine = torch.cat([-sine, sine], dim=1)
    cosine = torch.cat([cosine.new_ones(num_prefix, head_dim), cosine])
    sine = torch.cat([sine.new_zeros(num_prefix, head_dim), sine])
    return cosine, sine


def _table(coordinates: Tensor, num_prefix: int, head_dim: int, base: float, dtype: torch.dtype) -> RopeTable:
    cosine, sine = rope_factors(coordinates, num_prefix, head_dim, base)
    return RopeTable(cosine.to(dtype)[:, None, None], sine.to(dtype)[:, None, None])


@lru_cache(maxsize=64)
def _cached_table(
    grid: tuple[int, int], num_prefix: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> RopeTable:
    # a tensor created in inference mode could not be used in a later training step
    with torch.inference_mode(False):
        return _table(patch_centres(grid, device), num_prefix, head_dim, base, dtype)
