from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streamtrain.config.crops import CropsConfig
from streamtrain.diagnostics.inputs import MEAN, STD, STRUCTURE, VIEWS, measure_inputs

CROPS = CropsConfig(mean=(0.5,), std=(0.25,))
IMAGES, SIZE = 24, 32


def waves(rng: np.random.Generator, images: int) -> np.ndarray:
    """Return smooth images of different detail, uint8 [images, SIZE, SIZE, 3]."""
    across, down = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    periods, shifts = rng.uniform(12, 60, (2, images, 1, 1)), rng.uniform(0, 6, (images, 1, 1))
    values = np.sin(6.28 * across / periods[0] + shifts) + np.cos(6.28 * down / periods[1])
    return np.repeat(np.clip(128 + 60 * values, 0, 255)[..., None], 3, 3).astype(np.uint8)


def views(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Return two views of each image with noise, view-major."""
    noisy = [images + rng.integers(0, 3, images.shape) for _ in range(2)]
    return torch.from_numpy(np.concatenate(noisy).clip(0, 255).astype(np.uint8))


def test_statistics_of_the_pixels_match_numpy() -> None:
    rng = np.random.default_rng(0)
    crops = views(waves(rng, IMAGES), rng)
    values = measure_inputs(crops, CROPS)
    pixels = (crops.numpy() / 255 - 0.5) / 0.25
    assert values[MEAN] == pytest.approx(pixels.mean(), abs=1e-4) and values[STD] == pytest.approx(pixels.std())
    assert values[STRUCTURE] > 0.3 and values[VIEWS] > 0.9


def test_shuffled_pixels_have_no_structure_and_equal_images_equal_views() -> None:
    rng = np.random.default_rng(0)
    images = waves(rng, IMAGES)
    shuffled = np.stack([rng.permutation(image.reshape(-1, 3)).reshape(image.shape) for image in images])
    assert measure_inputs(views(shuffled, rng), CROPS)[STRUCTURE] < 0.1
    crops = torch.from_numpy(waves(rng, 2 * IMAGES))
    assert abs(measure_inputs(crops, CROPS)[VIEWS]) < 0.4


@pytest.mark.parametrize("value", [0, 200])
def test_blank_images_have_finite_statistics(value: int) -> None:
    values = measure_inputs(torch.full((8, SIZE, SIZE, 3), value, dtype=torch.uint8), CROPS)
    assert values[STD] == pytest.approx(0.0, abs=1e-5) and values[STRUCTURE] == 1.0 and values[VIEWS] == 0.0


def test_one_view_or_one_image_has_no_correlation_of_views() -> None:
    crops = torch.zeros(2, 4, 4, 1, dtype=torch.uint8)
    assert VIEWS not in measure_inputs(crops, CROPS)
    assert VIEWS not in measure_inputs(crops, CropsConfig(global_count=1))
