"""View parameters and crop sizes: their distribution, and that they depend on (seed, slot) only."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtrain.config.crops import BlurConfig, CropsConfig, CropSizes, JitterConfig, SolarizeConfig
from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.data.augment import SizeSchedule, ViewParameters, draw_views
from streamtrain.errors import ConfigError

CROPS = CropsConfig()


def equal_views(left: ViewParameters, right: ViewParameters) -> bool:
    return all(np.array_equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(ViewParameters))


def draw_many(crops: CropsConfig, width: int, height: int, count: int = 400) -> ViewParameters:
    return draw_views(crops, 1, np.arange(count), np.tile(np.int32([[width, height]]), (count, 1)))


@given(seed=st.integers(0, 2**62), first=st.integers(0, 2**40), count=st.integers(2, 9), data=st.data())
@settings(max_examples=25)
def test_a_sample_has_the_same_views_in_any_batch(seed: int, first: int, count: int, data: st.DataObject) -> None:
    slots = np.arange(first, first + count)
    sizes = np.array([[50 + 10 * k, 300 - 20 * k] for k in range(count)], np.int32)
    crops = CropsConfig(flip_vertical=0.5, rotate90=0.5, brightness=0.4, noise=0.1, channel_dropout=0.3)
    channels = data.draw(st.sampled_from([1, 2, 4, 13]))
    whole = draw_views(crops, seed, slots, sizes, channels)
    cut = data.draw(st.integers(1, count - 1))
    for part in (slice(0, cut), slice(cut, count)):
        assert equal_views(whole.rows(part), draw_views(crops, seed, slots[part], sizes[part], channels))


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
    views = draw_many(CROPS, width, height)
    extent = (views.roi_end - views.roi_start) * [height, width]
    share = extent.prod(-1) / (width * height)
    aspect = extent[..., 1] / extent[..., 0]
    assert aspect.min() > 3 / 4 - 0.01 and aspect.max() < 4 / 3 + 0.01
    assert abs(np.log(aspect).mean()) < 0.02  # log-uniform, so symmetric about 1
    assert 0.31 < share[:, :2].min() < 0.34 and 0.9 < share[:, :2].max() <= 1
    assert 0.049 < share[:, 2:].min() < 0.06 and 0.31 < share[:, 2:].max() < 0.325
    assert abs(share[:, 2:].mean() - (0.05 + 0.32) / 2) < 0.01  # uniform in area


@pytest.mark.parametrize(("image", "tall", "wide"), [((1200, 1000), 96, 64), ((900, 1300), 48, 64)])
def test_boxes_have_the_proportions_of_rectangular_crops(image: tuple[int, int], tall: int, wide: int) -> None:
    """The sizes of a step count, not the crops section; boxes are stretched as little as for squares."""
    slots, sizes = np.arange(400), np.tile(np.int32([image]), (400, 1))
    crops = CropsConfig(global_scale=(0.1, 0.3))
    views = draw_views(crops, 1, slots, sizes, crop_sizes=CropSizes.of([tall, wide], [wide, 2 * wide]))
    extent = (views.roi_end - views.roi_start) * image[::-1]
    stretch = extent[..., 1] / extent[..., 0] / np.array([wide / tall] * 2 + [2.0] * 8)
    assert 0.74 < stretch.min() < 0.78 and 1.29 < stretch.max() < 1.35 and abs(np.log(stretch).mean()) < 0.02
    share = extent.prod(-1) / np.prod(image)
    assert abs(share[:, :2].mean() - 0.2) < 0.01 and abs(share[:, 2:].mean() - (0.05 + 0.32) / 2) < 0.01


def test_a_box_that_does_not_fit_a_rectangle_falls_back_to_the_centre() -> None:
    """A crop of 1 : 4 of a square image, with at least 0.9 of its area."""
    views = draw_many(CropsConfig(global_scale=(0.9, 1.0), global_size=[16, 64]), 800, 800, 4)
    extent = (views.roi_end - views.roi_start)[:, :2] * 800
    np.testing.assert_allclose(extent, np.broadcast_to([800 / 3, 800], extent.shape), atol=1)
    np.testing.assert_allclose((views.roi_start + views.roi_end)[:, :2], 1, atol=2e-3)


def test_a_panorama_falls_back_to_its_clipped_centre() -> None:
    views = draw_many(CropsConfig(global_scale=(0.9, 1.0)), 4000, 100, 4)
    np.testing.assert_allclose(views.roi_start[:, :2, 0], 0)
    np.testing.assert_allclose(views.roi_end[:, :2, 0], 1)
    extent = (views.roi_end - views.roi_start)[:, :2, 1] * 4000
    np.testing.assert_allclose(extent, 133, atol=1)
    np.testing.assert_allclose((views.roi_start + views.roi_end)[:, :2, 1], 1, atol=1e-3)


def test_probabilities_and_ranges_of_colour() -> None:
    views = draw_many(CROPS, 500, 400, 2000)
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


def test_blur_and_solarize_probabilities_depend_on_the_view() -> None:
    views = draw_many(CROPS, 500, 400, 2000)
    share = (views.sigma > 0).mean(0)
    assert share[0] == 1 and abs(share[1] - 0.1) < 0.03 and abs(share[2:].mean() - 0.5) < 0.02
    blurred = views.sigma[views.sigma > 0]
    assert 0.1 <= blurred.min() < 0.11 and 1.99 < blurred.max() <= 2
    assert (views.solarize[:, [0, 2, 5]] == 256).all()
    assert abs((views.solarize[:, 1] == 128).mean() - 0.2) < 0.03


def test_probability_zero_changes_nothing() -> None:
    plain = CropsConfig(
        flip=0,
        grey=0,
        jitter=JitterConfig(probability=0),
        blur=BlurConfig(global_probability=(0,), local_probability=0),
        solarize=SolarizeConfig(global_probability=(0,)),
    )
    views = draw_many(plain, 500, 400, 50)
    assert (views.color == np.float32([1, 1, 1, 0])).all()
    assert not views.sigma.any() and not views.mirror.any() and (views.solarize == 256).all()


def test_the_last_probability_repeats_for_further_global_views() -> None:
    crops = CropsConfig(global_count=4, blur=BlurConfig(global_probability=(0.0, 1.0)))
    assert np.array_equal((draw_many(crops, 500, 400, 30).sigma > 0).mean(0)[:4], [0, 1, 1, 1])


def test_drawing_is_cheap() -> None:
    sizes = np.tile(np.int32([[500, 375]]), (64, 1))
    best = min(_seconds(lambda: draw_views(CROPS, 0, np.arange(64), sizes)) for _ in range(5))
    assert best / 64 < 200e-6


def _seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def config_of(shares: list[float], seed: int = 0) -> Config:
    entries = [{"share": share, "global_size": 32 * (index + 1)} for index, share in enumerate(shares)]
    return build({"run": {"seed": seed}, "crops": {"sizes": entries}})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=5),
    st.integers(0, 2**40),
    st.integers(1, 64),
    st.integers(0, 10**9),
    st.integers(0, 2**31),
)
def test_each_size_gets_its_share_of_any_200_steps(
    shares: list[int], start: int, batch: int, seed: int, step: int
) -> None:
    config = config_of([float(share) for share in shares], seed)
    schedule = SizeSchedule(config, batch, start)
    first = start + step * batch
    counts = Counter(schedule.sizes_at(first + index * batch) for index in range(200))
    for sizes, share in zip(config.crop_sizes, shares, strict=True):
        assert abs(counts[sizes] / 200 - share / sum(shares)) < 0.03
    # constant within a step, and equal after a resume at any step
    later = SizeSchedule(config, batch, first)
    assert {schedule.sizes_at(slot) for slot in range(first, first + batch)} == {later.sizes_at(first)}


def test_sizes_default_to_the_crops_section_and_are_validated() -> None:
    gram = {"objective": {"gram": {"weight": 1.0, "size": 64}}}
    entries = [{"share": 1, "local_size": 32}, {"share": 2, "global_size": 128, "gram_size": 96}]
    sizes = build({**gram, "crops": {"sizes": entries, "global_size": 64}}).crop_sizes
    assert sizes == (CropSizes.of(64, 32, 64), CropSizes.of(128, 96, 96))
    for crops, message in (
        ({"sizes": [{"share": 1, "local_size": 31}]}, "crops.sizes.0.local_size 31 is not a multiple"),
        ({"sizes": [{"share": 0}]}, "crops.sizes.0.share"),
        ({"sizes": [{"share": 1, "gram_size": 32}]}, "only with objective.gram.weight"),
        ({"rotate90": 0.1, "local_size": [32, 48]}, "crops.rotate90 needs square crops"),
        ({"rotate90": 0.1, "sizes": [{"share": 1, "global_size": [32, 48]}]}, "crops.rotate90 needs square crops"),
    ):
        with pytest.raises(ConfigError, match=message):
            build({"crops": crops})
    with pytest.raises(ConfigError, match="gram_size 64 does not have the proportions of the global crops, 32x48"):
        build({**gram, "crops": {"global_size": [32, 48]}})
    with pytest.raises(ConfigError, match="in every entry or in none"):
        build({"crops": {"sizes": entries}, "objective": {"gram": {"weight": 1.0}}})


def test_turns_have_their_share_and_leave_the_other_draws_alone() -> None:
    plain, turned = (
        draw_many(CROPS, 500, 400, 2000),
        draw_many(CROPS.model_copy(update={"flip_vertical": 0.3, "rotate90": 0.6}), 500, 400, 2000),
    )
    assert not plain.vertical.any() and not plain.transpose.any()
    for name in ("roi_start", "roi_end", "color", "sigma", "solarize"):
        assert np.array_equal(getattr(plain, name), getattr(turned, name))
    # a quarter or three quarters in two of three turns; half of the views are mirrored, whatever is turned
    assert abs(turned.transpose.mean() - 0.4) < 0.02 and abs(turned.mirror.mean() - 0.5) < 0.02
    assert abs(turned.vertical.mean() - (0.3 * 0.6 + 0.7 * 0.4)) < 0.02
