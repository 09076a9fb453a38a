"""Colour, blur and solarize: what they are, their order, and that they leave alone what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter

from streamtrain.data.appearance import Appearance, adjust
from streamtrain.data.augment import NO_SOLARIZE

SAME = (1.0, 1.0, 1.0, 0.0)


def picture(low: int = 40, high: int = 216) -> np.ndarray:
    """uint8 [48, 48, 3], smooth, of many colours."""
    tiles = np.random.default_rng(0).integers(low, high, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(tiles).resize((48, 48), Image.Resampling.BICUBIC))


def adjusted(
    image: np.ndarray, color: tuple[float, ...] = SAME, sigma: float = 0.0, solarize: int = NO_SOLARIZE
) -> np.ndarray:
    """The image after ``adjust``, beside one that is to stay as it is."""
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].repeat(2, 1, 1, 1)
    looks = Appearance.of(
        np.float32([color, SAME]), np.float32([sigma, 0]), np.array([solarize, NO_SOLARIZE], np.int32), len(image)
    )
    result = adjust(planes, looks)
    assert torch.equal(result[1], planes[1])
    return result[0].numpy().transpose(1, 2, 0).astype(int)


def test_brightness_contrast_and_saturation_are_pillows() -> None:
    image = Image.fromarray(picture(90, 160))
    expected = ImageEnhance.Brightness(image).enhance(1.3)
    assert abs(adjusted(picture(90, 160), (1.3, 1, 1, 0)) - np.asarray(expected)).max() <= 1
    expected = ImageEnhance.Contrast(image).enhance(0.6)
    assert abs(adjusted(picture(90, 160), (1, 0.6, 1, 0)) - np.asarray(expected)).max() <= 1
    expected = ImageEnhance.Color(image).enhance(1.2)
    assert abs(adjusted(picture(90, 160), (1, 1, 1.2, 0)) - np.asarray(expected)).max() <= 1
    expected = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.2)).enhance(1.3)
    assert abs(adjusted(picture(90, 160), (1.2, 1.3, 1, 0)) - np.asarray(expected)).max() <= 2


def test_grey_is_luma_and_hue_keeps_it() -> None:
    luma = picture() @ np.array([0.299, 0.587, 0.114])
    assert abs(adjusted(picture(), (1, 1, 0, 25)) - luma[..., None]).max() <= 0.51
    turned = adjusted(picture(90, 160), (1, 1, 1, 30))
    luma = picture(90, 160) @ np.array([0.299, 0.587, 0.114])
    assert abs(turned @ [0.299, 0.587, 0.114] - luma).max() < 1
    assert abs(turned - picture(90, 160)).mean() > 4
    assert abs(adjusted(picture(90, 160), (1, 1, 1, 360)) - picture(90, 160)).max() <= 1


def test_hue_turns_the_way_pillow_does() -> None:
    red = np.full((48, 48, 3), (200, 60, 60), np.uint8)
    turned = adjusted(red, (1, 1, 1, 36))[0, 0]
    assert turned[1] > turned[2] and turned[1] > 60  # towards yellow, as a rising hue in HSV


@pytest.mark.parametrize("size", [48, 40, 30, 13])
@pytest.mark.parametrize("sigma", [0.1, 0.28, 0.8, 1.4, 2.0])
def test_blur_is_a_gaussian_of_nine_taps_with_reflected_edges(sigma: float, size: int) -> None:
    image = picture()[:size, :size]
    offsets = np.arange(-4, 5)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    expected = image.astype(float)
    for axis in (0, 1):
        around = [(4, 4) if a == axis else (0, 0) for a in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(expected, around, mode="reflect"), 9, axis)
        expected = windows @ (kernel / kernel.sum())
    assert abs(adjusted(image, sigma=sigma) - expected).max() <= 0.51


def test_solarize_inverts_what_is_bright() -> None:
    image = picture().astype(int)
    assert np.array_equal(adjusted(picture(), solarize=128), np.where(image >= 128, 255 - image, image))


def test_colour_comes_first_and_solarize_last() -> None:
    color = (1.4, 1.4, 1, 0)  # clips, so that the order shows
    blurred = adjusted(picture(), color, sigma=1.5)
    bright = Image.fromarray(adjusted(picture(), color).astype(np.uint8))
    assert abs(blurred - np.asarray(bright.filter(ImageFilter.GaussianBlur(1.5))).astype(int)).mean() < 2
    assert np.array_equal(
        adjusted(picture(), color, sigma=1.5, solarize=128), np.where(blurred >= 128, 255 - blurred, blurred)
    )


@pytest.mark.gpu
def test_the_gpu_does_the_same_without_waiting() -> None:
    planes = torch.from_numpy(picture().transpose(2, 0, 1).copy())[None].repeat(4, 1, 1, 1)
    color = np.float32([SAME, (1.2, 0.7, 0.9, 20), (0.8, 1.1, 0, 0), (1.2, 1.2, 1.2, -20)])
    sigma, solarize = np.float32([0, 1.1, 0.4, 2]), np.int32([256, 256, 128, 128])
    looks = Appearance.of(color, sigma, solarize, 48)
    expected = adjust(planes, looks)
    on_gpu = planes.cuda()
    adjust(on_gpu, looks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = adjust(on_gpu, looks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (result.cpu().int() - expected.int()).abs().max() <= 1
