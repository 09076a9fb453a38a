"""Brightness, contrast, noise and dropped channels of images of any channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format.pixels import RGB, PixelFormat
from streamtrain.config.crops import CropsConfig
from streamtrain.data.augment import ViewParameters, draw_views
from streamtrain.data.batch import normalise
from streamtrain.data.perturb import Perturbation, draw_normal, perturb
from streamtrain.data.views import Appearance

OFF: dict[str, Any] = {"factors": np.ones((2, 10, 2), np.float32), "dropped": np.zeros((2, 10, 3), bool)}


def config(channels: int, **values: Any) -> CropsConfig:
    """Return settings for stored values around 500, with other statistics in each channel."""
    mean, std = np.linspace(0.1, 0.5, channels).tolist(), np.linspace(0.2, 0.6, channels).tolist()
    return CropsConfig(value_range=(100, 1100), mean=mean, std=std, **values)


def draw(crops: CropsConfig, channels: int, slots: int = 200) -> ViewParameters:
    return draw_views(crops, 3, np.arange(slots), np.full((slots, 2), 64, np.int32), channels)


def perturbed(crops: CropsConfig, planes: torch.Tensor, views: ViewParameters) -> torch.Tensor:
    """Return crops [slots, channels, S, S] of view 0, changed and normalised."""
    changed = planes.clone()
    perturb(changed, Perturbation.from_views(crops, views, 0, 1))
    return normalise(changed.permute(0, 2, 3, 1), crops.mean, crops.std, torch.float32, crops.value_range)


def test_defaults_change_no_bit() -> None:
    views = draw(CropsConfig(), 3, 2)
    assert Appearance.from_views(CropsConfig(), views, 0, 2, (32, 32), RGB).perturbation is None
    assert all(np.array_equal(getattr(views, name), values) for name, values in OFF.items())
    # a setting that is on for other views only
    planes = torch.randn(4, 3, 8, 8).mul_(1000)
    before = planes.clone()
    perturb(planes, Perturbation.from_views(CropsConfig(brightness=0.5), views, 0, 2))
    assert torch.equal(planes, before)


def test_draws_of_other_augmentations_do_not_depend_on_them() -> None:
    plain, all_on = draw(CropsConfig(), 3, 9), draw(CropsConfig(brightness=0.5, noise=0.1, channel_dropout=0.5), 3, 9)
    for name in ("roi_start", "roi_end", "color", "sigma", "solarize", "mirror", "vertical", "transpose"):
        assert np.array_equal(getattr(plain, name), getattr(all_on, name)), name


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_noise_has_the_asked_standard_deviation(kind: torch.dtype) -> None:
    crops = config(4, noise=0.25) if kind == torch.float32 else CropsConfig(mean=[0.5], std=[0.2], noise=0.25)
    planes = torch.full((50, 4, 32, 32), 120, dtype=kind)
    views = draw(crops, 4, 50)
    noise = perturbed(crops, planes, views) - perturbed(crops.model_copy(update={"noise": 0.0}), planes, views)
    assert noise.mean((0, 2, 3)).abs().max() < 0.005
    torch.testing.assert_close(noise.std((0, 2, 3)), torch.full((4,), 0.25), rtol=0.02, atol=0)
    # neither channels nor images share their noise
    assert torch.corrcoef(noise.transpose(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.02
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.09


def test_normal_draws_never_change() -> None:
    # a change would alter the views of every saved run
    torch.testing.assert_close(
        draw_normal(torch.tensor([7]), 3), torch.tensor([[1.0684585, 1.5857185, -0.4571262]]), rtol=1e-5, atol=1e-6
    )


@given(st.integers(-(2**62), 2**62), st.integers(1, 6))
@settings(max_examples=20)
def test_normal_draws_depend_on_their_key_only(key: int, others: int) -> None:
    keys = torch.tensor([key + row * 977 for row in range(others)])
    draws = draw_normal(keys, 20_000)
    assert torch.equal(draws[-1], draw_normal(keys[-1:], 20_000)[0])
    # mean, variance, skewness and kurtosis, within 6 standard errors
    for power, expected, error in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert (draws.double().pow(power).mean(1) - expected).abs().max() < 6 * error / 20_000**0.5


@pytest.mark.parametrize(("channels", "rate"), [(2, 0.5), (4, 0.3), (13, 0.1), (3, 0.9)])
def test_channels_are_dropped_at_the_asked_rate_and_never_all(channels: int, rate: float) -> None:
    crops = config(channels, channel_dropout=rate)
    views = draw(crops, channels, 400)
    assert not views.dropped.all(-1).any()
    # of the draws that would drop every channel, one channel remains
    expected = rate - rate**channels / channels
    error = (rate * (1 - rate) / views.dropped.size) ** 0.5
    assert abs(views.dropped.mean() - expected) < 4 * error + 1e-3
    planes = torch.rand(400, channels, 4, 4) * 1000 + 100
    found, dropped = perturbed(crops, planes, views), torch.from_numpy(views.dropped[:, 0])
    unchanged = perturbed(crops, planes, draw(config(channels), channels, 400))
    assert found[dropped].abs().max() < 1e-4 and torch.equal(found[~dropped], unchanged[~dropped])


@pytest.mark.parametrize("pixels", [PixelFormat(5, "uint16"), PixelFormat(2, "uint8")], ids=str)
def test_brightness_and_contrast_follow_their_formulas(pixels: PixelFormat) -> None:
    crops = config(pixels.channels, brightness=0.4, contrast=0.3)
    views = draw(crops, pixels.channels, 30)
    assert (abs(views.factors - 1).max((0, 1)) <= [0.4, 0.3]).all() and (views.factors.std((0, 1)) > 0.15).all()
    values = np.random.default_rng(0).uniform(100, 250, (30, pixels.channels, 8, 8)).round()
    brightness, contrast = views.factors[:, 0].T.astype(np.float64)[:, :, None, None, None]
    bright = 100 + brightness * (values - 100)
    expected = bright.mean((2, 3), keepdims=True) * (1 - contrast) + contrast * bright
    planes = torch.from_numpy(values).to(torch.uint8 if pixels.dtype == "uint8" else torch.float32)
    perturb(planes, Perturbation.from_views(crops, views, 0, 1))
    if pixels.dtype == "uint8":
        assert abs(planes.numpy() - np.clip(expected, 0, 255)).max() < 0.501
    else:
        np.testing.assert_allclose(planes.numpy(), expected, rtol=1e-5)
