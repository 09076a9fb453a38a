"""Crops and colours of the views: exact values, their order, and independence of batch and threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from host_syncs import cuda_syncs_raise
from PIL import Image, ImageEnhance, ImageFilter

from streamtrain.config.crops import CropsConfig, CropSizes
from streamtrain.data.augment import NO_SOLARIZE, draw_views
from streamtrain.data.views import Appearance, CpuViewMaker, apply_appearance, crop_and_resize, recolor_views
from streamtrain.ops.logits import scaled_logits

CROPS = CropsConfig(global_size=64, local_size=32, local_count=3)
SAME = (1.0, 1.0, 1.0, 0.0)
NO_COLOURS = {
    "jitter": {"probability": 0}, "grey": 0, "solarize": {"global_probability": [0]},
    "blur": {"global_probability": [0], "local_probability": 0},
}  # fmt: skip


def picture(low: int = 40, high: int = 216) -> np.ndarray:
    """Return a smooth image of many colours, uint8 [48, 48, 3]."""
    tiles = np.random.default_rng(0).integers(low, high, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(tiles).resize((48, 48), Image.Resampling.BICUBIC))


def recolored(
    image: np.ndarray, color: tuple[float, ...] = SAME, sigma: float = 0.0, solarize: int = NO_SOLARIZE
) -> np.ndarray:
    """Return the image after ``apply_appearance``, in a batch with an image without changes."""
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())[None].repeat(2, 1, 1, 1)
    appearance = Appearance.from_parameters(
        np.float32([color, SAME]), np.float32([sigma, 0]), np.array([solarize, NO_SOLARIZE], np.int32), image.shape[:2]
    )
    result = apply_appearance(planes, appearance)
    assert torch.equal(result[1], planes[1])
    return result[0].numpy().transpose(1, 2, 0).astype(int)


def test_brightness_contrast_and_saturation_match_pillow() -> None:
    image = Image.fromarray(picture(90, 160))
    expected = ImageEnhance.Brightness(image).enhance(1.3)
    assert abs(recolored(picture(90, 160), (1.3, 1, 1, 0)) - np.asarray(expected)).max() <= 1
    expected = ImageEnhance.Contrast(image).enhance(0.6)
    assert abs(recolored(picture(90, 160), (1, 0.6, 1, 0)) - np.asarray(expected)).max() <= 1
    expected = ImageEnhance.Color(image).enhance(1.2)
    assert abs(recolored(picture(90, 160), (1, 1, 1.2, 0)) - np.asarray(expected)).max() <= 1
    expected = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.2)).enhance(1.3)
    assert abs(recolored(picture(90, 160), (1.2, 1.3, 1, 0)) - np.asarray(expected)).max() <= 2


def test_grey_is_luma_and_hue_preserves_luma() -> None:
    luma = picture() @ np.array([0.299, 0.587, 0.114])
    assert abs(recolored(picture(), (1, 1, 0, 25)) - luma[..., None]).max() <= 0.51
    rotated = recolored(picture(90, 160), (1, 1, 1, 30))
    luma = picture(90, 160) @ np.array([0.299, 0.587, 0.114])
    assert abs(rotated @ [0.299, 0.587, 0.114] - luma).max() < 1
    assert abs(rotated - picture(90, 160)).mean() > 4
    assert abs(recolored(picture(90, 160), (1, 1, 1, 360)) - picture(90, 160)).max() <= 1


def test_hue_rotates_in_the_direction_of_hsv() -> None:
    red = np.full((48, 48, 3), (200, 60, 60), np.uint8)
    rotated = recolored(red, (1, 1, 1, 36))[0, 0]
    assert rotated[1] > rotated[2] and rotated[1] > 60  # towards yellow, like increasing hue in HSV


@pytest.mark.parametrize("size", [(48, 48), (40, 48), (30, 16), (13, 13)])
@pytest.mark.parametrize("sigma", [0.1, 0.28, 0.8, 1.4, 2.0])
def test_blur_is_a_gaussian_of_nine_taps_with_reflected_edges(sigma: float, size: tuple[int, int]) -> None:
    image = picture()[: size[0], : size[1]]
    offsets = np.arange(-4, 5)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    expected = image.astype(float)
    for axis in (0, 1):
        around = [(4, 4) if a == axis else (0, 0) for a in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(expected, around, mode="reflect"), 9, axis)
        expected = windows @ (kernel / kernel.sum())
    assert abs(recolored(image, sigma=sigma) - expected).max() <= 0.51


def test_solarize_inverts_values_from_the_threshold_on() -> None:
    image = picture().astype(int)
    assert np.array_equal(recolored(picture(), solarize=128), np.where(image >= 128, 255 - image, image))


def test_order_is_colour_then_blur_then_solarize() -> None:
    color = (1.4, 1.4, 1, 0)  # clips, so a different order changes the result
    blurred = recolored(picture(), color, sigma=1.5)
    bright = Image.fromarray(recolored(picture(), color).astype(np.uint8))
    assert abs(blurred - np.asarray(bright.filter(ImageFilter.GaussianBlur(1.5))).astype(int)).mean() < 2
    assert np.array_equal(
        recolored(picture(), color, sigma=1.5, solarize=128), np.where(blurred >= 128, 255 - blurred, blurred)
    )


@pytest.mark.gpu
def test_gpu_matches_cpu_without_host_sync() -> None:
    planes = torch.from_numpy(picture().transpose(2, 0, 1).copy())[None].repeat(4, 1, 1, 1)
    color = np.float32([SAME, (1.2, 0.7, 0.9, 20), (0.8, 1.1, 0, 0), (1.2, 1.2, 1.2, -20)])
    sigma, solarize = np.float32([0, 1.1, 0.4, 2]), np.int32([256, 256, 128, 128])
    appearance = Appearance.from_parameters(color, sigma, solarize, (48, 48))
    expected = apply_appearance(planes, appearance)
    on_gpu = planes.cuda()
    apply_appearance(on_gpu, appearance)
    with cuda_syncs_raise():
        result = apply_appearance(on_gpu, appearance)
    assert (result.cpu().int() - expected.int()).abs().max() <= 1


def images(count: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (90 + 5 * k, 120 - 3 * k, 3), dtype=np.uint8)) for k in range(count)]


def test_crops_match_pillow() -> None:
    image = images(1)[0]
    out = torch.empty(3, 40, 40, dtype=torch.uint8)
    box = (9, 7, 54, 81)
    expected = Image.fromarray(image.numpy()).crop(box).resize((40, 40), Image.Resampling.BICUBIC)
    for mirror in (False, True):
        crop_and_resize(image.permute(2, 0, 1)[None], (7, 9), (81, 54), mirror=mirror, out=out)
        expected_crop = np.asarray(expected)[:, ::-1] if mirror else np.asarray(expected)
        # on white noise, clipping between the two passes depends on their order
        assert abs(out.permute(1, 2, 0).numpy().astype(int) - expected_crop).mean() < 0.5


@pytest.mark.parametrize("mirrored", [0, 1])
def test_ramps_show_that_height_and_width_are_not_exchanged(mirrored: int) -> None:
    """Red grows with x and green with y, in an image with the proportions of the crops."""
    y, x = np.mgrid[0:128, 0:192]
    ramps = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    crops = CropsConfig(
        **NO_COLOURS, global_size=[64, 96], local_size=[32, 48], local_count=1, global_count=1, flip=mirrored,
        global_scale=(1, 1), local_scale=(1, 1), aspect=(1, 1),
    )  # fmt: skip
    views = draw_views(crops, 0, np.arange(2), np.tile(np.int32([[192, 128]]), (2, 1)))
    maker = CpuViewMaker(crops, 1)
    made = maker.make_views([torch.from_numpy(ramps)] * 2, views, CropSizes.of([64, 96], [32, 48], [128, 192]))
    maker.close()
    for each, reduction in zip(made, (2, 4, 1), strict=True):
        assert each is not None and each.shape == (2, 128 // reduction, 192 // reduction, 3)
        centres = [(np.arange(0, size, reduction) + (reduction - 1) / 2) for size in (128, 192)]
        red = centres[1][::-1] if mirrored else centres[1]
        # at the borders, the filter is cut
        shown = each.numpy()[:, 1:-1, 1:-1].astype(float)
        assert abs(shown[..., 0] - red[1:-1]).max() <= 1 and abs(shown[..., 1] - centres[0][1:-1, None]).max() <= 1


def test_rows_are_view_major_and_independent_of_the_batch() -> None:
    pictures = images(5)
    sizes = np.array([[p.shape[1], p.shape[0]] for p in pictures], np.int32)
    views = draw_views(CROPS, 3, np.arange(5), sizes)
    before = torch.get_num_threads()
    workers = CpuViewMaker(CROPS, threads=2)
    torch.rand(2**17).exp()  # large enough for torch to use several threads
    counts = [workers.submit(lambda: (torch.rand(2**17).exp(), torch.get_num_threads())[1]) for _ in range(4)]
    assert {count.result() for count in counts} == {1}
    sizes = CropSizes.of(64, 32, gram_size=48)
    together = workers.make_views(pictures, views, sizes)
    assert together[2].shape == (10, 48, 48, 3)
    assert together[0].shape == (10, 64, 64, 3) and together[1].shape == (15, 32, 32, 3)
    for row, picture in enumerate(pictures):
        alone = workers.make_views([picture], views.rows(slice(row, row + 1)), sizes)
        for whole, one in zip(together, alone, strict=True):
            assert torch.equal(whole[row::5], one)
    workers.close()
    assert torch.get_num_threads() == before


def test_recolor_views_matches_the_cpu_view_maker() -> None:
    pictures = [p[:64, :64].contiguous() for p in images(4)]
    sizes = np.full((4, 2), 64, np.int32)
    views = draw_views(CROPS, 3, np.arange(4), sizes)
    views.roi_start[:], views.roi_end[:], views.mirror[:] = 0, 1, 0
    workers = CpuViewMaker(CROPS, threads=1)
    expected = workers.make_views(pictures, views, CropSizes.of(64, 32))[0]
    workers.close()
    crops = torch.stack(pictures)
    assert torch.equal(recolor_views(CROPS, [crops, crops], views, 0), expected)


def test_gram_crops_have_the_global_boxes_without_colour_changes() -> None:
    pictures = images(3)
    sizes = np.array([[p.shape[1], p.shape[0]] for p in pictures], np.int32)
    views = draw_views(CROPS, 3, np.arange(3), sizes)
    plain = replace(
        views, color=np.broadcast_to(np.float32([1, 1, 1, 0]), views.color.shape).copy(),
        sigma=np.zeros_like(views.sigma), solarize=np.full_like(views.solarize, 256),
    )  # fmt: skip
    workers = CpuViewMaker(CROPS, threads=1)
    coloured, _, gram = workers.make_views(pictures, views, CropSizes.of(64, 32, gram_size=64))
    uncoloured, _, none = workers.make_views(pictures, plain, CropSizes.of(64, 32))
    workers.close()
    assert none is None and torch.equal(gram, uncoloured) and not torch.equal(gram, coloured)


def test_concurrent_training_changes_no_pixel() -> None:
    crops = torch.rand(4, 3, 96, 96).mul_(255).round_()
    color, sigma = np.tile(np.float32([1.2, 0.8, 1.1, 10]), (4, 1)), np.full(4, 1.3, np.float32)
    appearance = Appearance.from_parameters(color, sigma, np.full(4, 256, np.int32), (96, 96))
    expected = apply_appearance(crops, appearance)
    features, prototypes = torch.randn(256, 64).bfloat16(), torch.randn(8192, 64).bfloat16()
    stop = Event()

    def train() -> None:
        while not stop.is_set():
            scaled_logits(features, prototypes, 0.1)

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        same = [torch.equal(apply_appearance(crops, appearance), expected) for _ in range(50)]
        stop.set()
        training.result()
    assert all(same)


def test_quarter_turns_and_flips_are_exact() -> None:
    image = torch.from_numpy(picture().copy())
    turns = CropsConfig(**NO_COLOURS, flip=0, flip_vertical=0.5, rotate90=0.75, global_scale=(1, 1), aspect=(1, 1))
    sizes = CropSizes.of(48, 48, gram_size=48)
    views = draw_views(turns, 3, np.arange(16), np.tile(np.int32([[48, 48]]), (16, 1)))
    maker = CpuViewMaker(turns.model_copy(update={"local_count": 0}), 1)
    crops, _, gram = maker.make_views([image] * 16, views, sizes)
    maker.close()
    assert gram is not None and torch.equal(gram, crops)
    seen = set()
    for crop in crops:
        each = [torch.rot90(image if not flipped else image.flip(0), count) for flipped in (0, 1) for count in range(4)]
        (kind,) = [number for number, expected in enumerate(each) if torch.equal(crop, expected)]
        seen.add(kind)
    assert seen == set(range(8))
    # as on a GPU, where DALI flips and the exchange of rows and columns follows
    flips = np.stack([views.vertical[:, 0], views.mirror[:, 0]], 1)
    flipped = torch.stack([image.flip(np.flatnonzero(axes).tolist()) for axes in flips])
    assert torch.equal(recolor_views(CROPS, [flipped], views, 0), crops[:16])
