"""The depth head agrees with scikit-learn's ridge regression, and the errors with their formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mapped_folders import mapped_folder
from PIL import Image

from shards.format.pixels import RGB
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.depth import (
    Moments,
    delta1,
    estimate_depth,
    fit_ridge,
    rmse,
    squared_error,
    sum_errors,
    train_head,
)
from streamtrain.evaluation.label_maps import DEPTH, open_mapped, split_mapped
from streamtrain.evaluation.patches import PatchNetwork

PIXELS = PatchNetwork(None, 8, 32, 32, (0.5,) * 3, (0.25,) * 3, ((0.0, 255.0),), "cpu")


def test_the_head_is_ridge_regression_of_standardised_features() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 12, generator=generator) * torch.logspace(-1, 2, 12) + 3
    target = features @ torch.randn(12, generator=generator) / 50 + torch.randn(500, generator=generator)
    moments = Moments(12, torch.device("cpu"))
    for rows in torch.arange(500).split(70):
        moments.add(features[rows], target[rows])
    mean, deviation = features.mean(0), features.std(0, correction=0)
    for penalty, (weight, bias) in zip((1e-3, 1.0), fit_ridge(moments, (1e-3, 1.0)), strict=True):
        model = linear_model.Ridge(alpha=penalty * 500).fit(((features - mean) / deviation).numpy(), target.numpy())
        predicted = (features.double() @ weight + bias)[:, 0].numpy()
        np.testing.assert_allclose(
            predicted, model.predict(((features - mean) / deviation).numpy()), rtol=1e-3, atol=1e-3
        )
        error = ((predicted - target.numpy()) ** 2).mean()
        assert squared_error(moments, weight, bias) == pytest.approx(error, rel=1e-6)


def test_errors_are_those_of_their_formulas() -> None:
    rng = np.random.default_rng(0)
    depth, expected = rng.uniform(1, 3, (2, 4, 100))
    sums = np.stack([sum_errors(*pair) for pair in zip(depth, expected, strict=True)])
    assert rmse(sums.sum(0)) == pytest.approx(np.sqrt(np.mean((depth - expected) ** 2)))
    assert delta1(sums.sum(0)) == pytest.approx(np.mean(np.maximum(depth / expected, expected / depth) < 1.25))
    assert 0.1 < delta1(sums.sum(0)) < 0.9


def test_depth_that_follows_from_the_patch_is_learned(tmp_path: Path) -> None:
    """Images of one brightness each, whose log is linear in depth; a corner of unknown depth does not count."""
    for name in ("images", "depth"):
        (tmp_path / name).mkdir()
    for index in range(20):
        grey = 20 + 10 * index
        Image.new("RGB", (40, 40), (grey,) * 3).save(tmp_path / "images" / f"{index}.png")
        depth = np.full((40, 40), np.exp(grey / 100), np.float32)
        depth[:10, :10] = (np.nan, -1)[index % 2]
        np.save(tmp_path / "depth" / f"{index}.npy", depth)
    mapped = open_mapped(tmp_path / "images", tmp_path / "depth", DEPTH, RGB)
    found = estimate_depth(PIXELS, mapped, mapped)
    assert rmse(found.sums.sum(0)) < 0.05 and delta1(found.sums.sum(0)) > 0.999
    assert found.train_images == 20 and found.images == tuple(range(20)) and found.feature_dim == 192
    assert (found.sums[:, 2] == 32 * 32 - 64).all()


def test_predictions_stay_in_the_range_of_training(tmp_path: Path) -> None:
    folder = mapped_folder(tmp_path, 10)
    mapped = open_mapped(folder / "images", folder / "depth", DEPTH, RGB)
    head, num_images, num_pixels = train_head(PIXELS, mapped)
    depth = head.depth(1000 * torch.randn(16, 192, generator=torch.Generator().manual_seed(0)), PIXELS)
    assert depth.shape == (32, 32) and 1.499 < depth.min() < depth.max() < 4.001
    assert (num_images, num_pixels) == (10, 10 * 1024)


def test_too_few_images_with_depth_are_refused(tmp_path: Path) -> None:
    folder = mapped_folder(tmp_path, 10)
    mapped = open_mapped(folder / "images", folder / "depth", DEPTH, RGB)
    train, test = split_mapped(mapped)
    unknown = replace(mapped, kind=replace(DEPTH, decode=lambda payload: 0 * DEPTH.decode(payload)))
    with pytest.raises(StreamtrainError, match="too few to learn from"):
        estimate_depth(PIXELS, unknown, test)
    with pytest.raises(StreamtrainError, match="two are needed"):
        estimate_depth(PIXELS, train, unknown)
