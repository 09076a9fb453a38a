"""The law of the views, and that nothing but (seed, slot) decides them."""

from __future__ import annotations

import time
from dataclasses import fields

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.config.crops import BlurConfig, CropsConfig, JitterConfig, SolarizeConfig
from streamtrain.data.augment import ViewParameters, draw_views

CROPS = CropsConfig()


def same(left: ViewParameters, right: ViewParameters) -> bool:
    return all(np.array_equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(ViewParameters))


def rows(views: ViewParameters, chosen: slice) -> ViewParameters:
    return ViewParameters(**{f.name: getattr(views, f.name)[chosen] for f in fields(ViewParameters)})


def many(crops: CropsConfig, width: int, height: int, count: int = 400) -> ViewParameters:
    return draw_views(crops, 1, np.arange(count), np.tile(np.int32([[width, height]]), (count, 1)))


@given(
    seed=st.integers(0, 2**62), first=st.integers(0, 2**40), count=st.integers(2, 9), data=st.data()
)
@settings(max_examples=25)
def test_a_sample_has_the_same_views_in_any_batch(seed: int, first: int, count: int, data: st.DataObject) -> None:
    slots = np.arange(first, first + count)
    sizes = np.array([[50 + 10 * k, 300 - 20 * k] for k in range(count)], np.int32)
    whole = draw_views(CROPS, seed, slots, sizes)
    cut = data.draw(st.integers(1, count - 1))
    for part in (slice(0, cut), slice(cut, count)):
        assert same(rows(whole, part), draw_views(CROPS, seed, slots[part], sizes[part]))


@given(width=st.integers(1, 4000), height=st.integers(1, 4000), seed=st.integers(0, 2**32))
@settings(max_examples=40)
def test_boxes_are_whole_pixels_inside_the_image(width: int, height: int, seed: int) -> None:
    views = draw_views(CROPS, seed, np.arange(8), np.tile(np.int32([[width, height]]), (8, 1)))
    size = np.array([height, width])
    start, end = views.roi_start * size, views.roi_end * size
    assert (views.roi_start >= 0).all() and (views.roi_end <= 1).all()
    assert (end - start >= 1 - 1e-3).all()
    np.testing.assert_allclose(start, np.rint(start), atol=2e-3)
    np.testing.assert_allclose(end, np.rint(end), atol=2e-3)


def test_area_and_aspect_follow_the_recipe_on_true_pixels() -> None:
    width, height = 1200, 1000
    views = many(CROPS, width, height)
    extent = (views.roi_end - views.roi_start) * [height, width]
    share = extent.prod(-1) / (width * height)
    aspect = extent[..., 1] / extent[..., 0]
    assert aspect.min() > 3 / 4 - 0.01 and aspect.max() < 4 / 3 + 0.01
    assert abs(np.log(aspect).mean()) < 0.02  # log-uniform, so symmetric about 1
    assert 0.31 < share[:, :2].min() < 0.34 and 0.9 < share[:, :2].max() <= 1
    assert 0.049 < share[:, 2:].min() < 0.06 and 0.31 < share[:, 2:].max() < 0.325
    assert abs(share[:, 2:].mean() - (0.05 + 0.32) / 2) < 0.01  # uniform in area


def test_a_panorama_gets_its_clipped_centre() -> None:
    views = many(CropsConfig(global_scale=(0.9, 1.0)), 4000, 100, 4)
    np.testing.assert_allclose(views.roi_start[:, :2, 0], 0)
    np.testing.assert_allclose(views.roi_end[:, :2, 0], 1)
    extent = (views.roi_end - views.roi_start)[:, :2, 1] * 4000
    np.testing.assert_allclose(extent, 133, atol=1)
    np.testing.assert_allclose((views.roi_start + views.roi_end)[:, :2, 1], 1, atol=1e-3)


def test_probabilities_and_ranges_of_colour() -> None:
    views = many(CROPS, 500, 400, 2000)
    brightness, contrast, saturation, hue = np.moveaxis(views.color, -1, 0)
    jittered = hue != 0
    assert abs(jittered.mean() - 0.8) < 0.01
    assert 0.6 <= brightness.min() < 0.61 and 1.39 < brightness.max() <= 1.4
    assert 0.6 <= contrast.min() < 0.61 and 1.39 < contrast.max() <= 1.4
    assert abs((saturation == 0).mean() - 0.2) < 0.01
    coloured = saturation[saturation > 0]
    assert 0.8 <= coloured.min() < 0.81 and 1.19 < coloured.max() <= 1.2
    assert -36 <= hue.min() < -35 and 35 < hue.max() <= 36
    assert (brightness[~jittered] == 1).all() and (contrast[~jittered] == 1).all()
    assert abs(views.mirror.mean() - 0.5) < 0.02


def test_blur_and_solarize_go_by_view() -> None:
    views = many(CROPS, 500, 400, 2000)
    share = (views.sigma > 0).mean(0)
    assert share[0] == 1 and abs(share[1] - 0.1) < 0.03 and abs(share[2:].mean() - 0.5) < 0.02
    blurred = views.sigma[views.sigma > 0]
    assert 0.1 <= blurred.min() < 0.11 and 1.99 < blurred.max() <= 2
    assert (views.solarize[:, [0, 2, 5]] == 256).all()
    assert abs((views.solarize[:, 1] == 128).mean() - 0.2) < 0.03


def test_nothing_is_changed_where_the_recipe_asks_for_nothing() -> None:
    plain = CropsConfig(
        flip=0, grey=0, jitter=JitterConfig(probability=0),
        blur=BlurConfig(global_probability=(0,), local_probability=0), solarize=SolarizeConfig(global_probability=(0,)),
    )
    views = many(plain, 500, 400, 50)
    assert (views.color == np.float32([1, 1, 1, 0])).all()
    assert not views.sigma.any() and not views.mirror.any() and (views.solarize == 256).all()


def test_the_last_probability_repeats_for_further_global_views() -> None:
    crops = CropsConfig(global_count=4, blur=BlurConfig(global_probability=(0.0, 1.0)))
    assert np.array_equal((many(crops, 500, 400, 30).sigma > 0).mean(0)[:4], [0, 1, 1, 1])


def test_drawing_is_cheap() -> None:
    sizes = np.tile(np.int32([[500, 375]]), (64, 1))
    best = min(_seconds(lambda: draw_views(CROPS, 0, np.arange(64), sizes)) for _ in range(5))
    assert best / 64 < 200e-6


def _seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
