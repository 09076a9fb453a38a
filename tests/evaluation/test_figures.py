from __future__ import annotations

import gc
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from streamtrain.evaluation.figures import (
    DPI,
    Tile,
    draw_charts,
    draw_page,
    is_log_scale,
    photo,
    read_lines,
    running_mean,
    short_number,
    shorten,
    shorten_middle,
    value_range,
)
from streamtrain.evaluation.figures import _text_width as text_width

RED = (230, 30, 40)
COLOURS = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def test_importing_evaluation_imports_no_matplotlib() -> None:
    modules = "streamtrain.evaluation.over_time, streamtrain.evaluation.online, streamtrain.evaluation.report"
    code = f"import sys, {modules}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_drawing_does_not_use_pyplot() -> None:
    draw_charts({"run": [{"step": 1, "a": 1.0}]}, ["a"])
    draw_page("title", "", [[photo(Image.new("RGB", (8, 8)))]])
    assert "matplotlib.pyplot" not in sys.modules


def test_pixels_and_images_of_a_page_are_released_without_a_garbage_collection() -> None:
    def drawing_memory() -> int:
        names = [type(each).__name__ for each in gc.get_objects()]
        return names.count("RendererAgg") + names.count("AxesImage")

    def page() -> Image.Image:
        return draw_page("page", "", [[Tile(np.zeros((4, 4)), (32, 32), "map")]], "value")

    page()  # makes the renderer that measures texts
    gc.collect()
    before = drawing_memory()
    gc.disable()
    try:
        page()
        assert drawing_memory() == before
    finally:
        gc.enable()


def test_running_mean_keeps_length_and_follows_straight_lines() -> None:
    straight = np.linspace(3.0, -2.0, 500)
    np.testing.assert_allclose(running_mean(straight)[12:-12], straight[12:-12], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=500)
    mean = running_mean(noise)
    # at the ends too, where the window is half as long
    assert len(mean) == 500 and mean.std() < 0.4 and abs(mean[[0, -1]]).max() < 1.0
    assert running_mean(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]


def test_missing_and_non_finite_values_are_left_out() -> None:
    records = [{"step": step, "a": value} for step, value in enumerate([None, 1.0, math.nan, None, 2.0])]
    (line,) = read_lines({"run": records, "empty": []}, "a")
    assert line.name == "run" and line.steps.tolist() == [1, 4] and line.values.tolist() == [1, 2]
    assert read_lines({"run": records}, "missing") == []
    assert draw_charts({"run": records}, ["missing"]) is None


@pytest.mark.parametrize("values", [[0.0], [math.nan, None], [1e-9, 1e-9, 1e-9], [1.0, 1e12, 1.0]])
def test_charts_of_any_values_are_drawn(values: list[float | None]) -> None:
    chart = draw_charts({"": [{"step": step, "a": value} for step, value in enumerate(values)]}, ["a"])
    assert chart is not None and chart.size == (840, 480)
    # something other than the white ground is drawn
    assert np.asarray(chart).min() < 200


def test_several_runs_share_a_legend_and_have_their_own_colours() -> None:
    runs = {
        name: [{"step": step, "a": start / step} for step in range(1, 40)]
        for name, start in (("x", 5), ("y", 9), ("$no math_", 1))
    }
    page = draw_charts(runs, ["a"], "Curves", "three runs")
    alone = draw_charts({"x": runs["x"]}, ["a"], "Curves", "one run")
    assert page is not None and alone is not None
    pixels = np.asarray(page)
    for colour in ((0, 114, 178), (213, 94, 0)):
        assert (pixels == colour).all(-1).sum() > 300
    assert not (np.asarray(alone) == (213, 94, 0)).all(-1).any() and page.height > alone.height


def test_a_run_has_the_same_colour_in_every_chart_although_others_lack_a_tag() -> None:
    runs = {
        name: [
            {"step": step, "a": index + step / 40, **({"b": 1.0 + index * step} if index else {})}
            for step in range(1, 40)
        ]
        for index, name in enumerate(("x", "y", "z"))
    }
    page = draw_charts(runs, ["a", "b"], "Curves", "three runs")
    assert page is not None
    left, right = np.split(np.asarray(page), 2, axis=1)
    blue, orange, green = ((left == colour).all(-1)[200:].sum() for colour in COLOURS)
    assert min(blue, orange, green) > 100
    # run x has no tag b; the others keep their colours
    blue, orange, green = ((right == colour).all(-1)[200:].sum() for colour in COLOURS)
    assert blue == 0 and min(orange, green) > 100


def test_many_runs_with_long_names_stay_distinguishable() -> None:
    names = [f"experiments/a-long-folder-name/{'very-' * 30}long-run-name-{index}" for index in range(9)]
    shown = [shorten_middle(name, 300, 11) for name in names]
    assert len(set(shown)) == 9 and all(text_width(name, 11) <= 300 for name in shown)
    assert (
        shown[0].startswith("experiments") and shown[0].endswith("-0") and shorten_middle("short", 300, 11) == "short"
    )
    runs = {name: [{"step": step, "a": step + index} for step in (1, 2, 3)] for index, name in enumerate(names)}
    page = draw_charts(runs, ["a", "b"], "Curves", "nine runs")
    assert page is not None and page.width == 840


def test_axes_of_flat_and_of_steep_curves() -> None:
    low, high = value_range([np.array([2.0, 2.0 + 1e-9])])
    assert 0.03 < high - low < 0.1 and low < 2.0 < high
    assert value_range([np.zeros(3)]) == (-0.05, 1.0)
    steep = [np.array([100.0, 0.1])]
    assert is_log_scale("optim/gradient_norm", steep) and not is_log_scale("speed/images_per_second", steep)
    assert not is_log_scale("loss/total", [np.array([100.0, -0.1])])
    records = [{"step": step, "optim/gradient_norm": 10.0 ** (2 - step / 50)} for step in range(1, 200)]
    chart = np.asarray(draw_charts({"": records}, ["optim/gradient_norm"]))
    rows, columns = np.nonzero((chart == COLOURS[0]).all(-1))
    # a straight line from corner to corner
    assert abs(np.corrcoef(rows, columns)[0, 1]) > 0.99


def test_a_spike_does_not_flatten_the_curve() -> None:
    values = [10.0 - step / 100 for step in range(1000)]
    records = [{"step": step, "a": 1e6 if step == 500 else value} for step, value in enumerate(values)]
    chart = draw_charts({"": records}, ["a"])
    rows = np.argwhere((np.asarray(chart) == (0, 114, 178)).all(-1))[:, 0]
    assert np.quantile(rows, 0.95) - np.quantile(rows, 0.05) > 100


def test_numbers_are_short() -> None:
    assert [short_number(value) for value in (0, 0.25, 12_000, 3e-5, -1.5e6)] == ["0", "0.25", "12k", "3e-05", "-1.5M"]


def test_text_is_cut_to_its_width() -> None:
    assert shorten("short", 500, 12) == "short"
    cut = shorten("a very long name of a file.jpg", 80, 12)
    assert cut.endswith("…") and text_width(cut, 12) <= 80 < text_width("a very long name of a file.jpg", 12)


def test_pages_have_exact_tiles_and_marks() -> None:
    image = Image.new("RGB", (60, 40), (1, 2, 3))
    page = draw_page("Title", "subtitle", [[photo(image, "a name that is too long " * 9)] * 2])
    assert ((np.asarray(page) == (1, 2, 3)).all(-1)).sum() == 2 * 60 * 40 and DPI == 72
    marked = draw_page("", "", [[photo(Image.new("RGB", (80, 40), (0, 0, 255)), marks=[(1, 3)], grid=(2, 4))]])
    blue = np.argwhere((np.asarray(marked) == (0, 0, 255)).all(-1))
    red = np.argwhere((np.asarray(marked) == RED).all(-1))
    np.testing.assert_allclose(red.mean(0) - blue.min(0), (30, 70), atol=1.5)


def test_maps_are_drawn_in_viridis_between_their_limits() -> None:
    values = np.array([[-1.0, 0.0, 1.0]])
    page = np.asarray(draw_page("", "", [[Tile(values, (30, 10), limits=(-1.0, 1.0))]], "scale"))
    start = tuple(np.argwhere((page == (68, 1, 84)).all(-1))[0])
    assert page[start[0], start[1] + 15].tolist() == [32, 144, 140] and page[start[0], start[1] + 25].tolist() == [
        253,
        231,
        36,
    ]
