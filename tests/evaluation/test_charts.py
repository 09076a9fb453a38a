"""Charts of the report: readable at any width, bounded, and honest about flat curves."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from streamtrain.evaluation.charts import MAX_MARKED, MAX_POINTS, Baseline, svg_chart


def records(values: list[float | None], tag: str = "a") -> list[dict[str, Any]]:
    return [{"step": step, tag: value} for step, value in enumerate(values, 1)]


def parse(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def ticks(chart: str) -> list[str]:
    return [each.text or "" for each in parse(chart).iter("text") if each.get("text-anchor") == "end"]


def curve(chart: str) -> list[tuple[int, int]]:
    """Return the points of the last polyline, in thousandths of the plot."""
    points = list(parse(chart).iter("polyline"))[-1].get("points", "").split()
    return [(int(x), int(y)) for x, y in (point.split(",") for point in points)]


@pytest.mark.parametrize(
    "values", [[0.0], [None, None], [1e-9] * 3, [1.0, 1e12, 1.0], [-1e99, 1e99], [1e-300, 1e300], [math.nan, 2.0]]
)
@pytest.mark.parametrize("tag", ["a", "loss/total", "eval/knn_20", "memory/rss_bytes", "speed/step_seconds"])
def test_charts_of_any_values_are_well_formed(values: list[float | None], tag: str) -> None:
    chart = svg_chart(tag, records(values, tag), [Baseline("<b>", 0.5)], (0, 0.1), {0: 0.1, 1: 0.2})
    assert parse(chart).tag == "figure" and "<b>" not in chart.replace("<figcaption><b>", "")
    assert "nan" not in chart and "inf" not in chart


def test_a_nearly_constant_curve_looks_flat() -> None:
    chart = svg_chart("a", records([5.0, 5.000001, 5.0, 4.999999] * 20))
    heights = [y for _, y in curve(chart)]
    assert max(heights) - min(heights) <= 1 and all(450 < y < 550 for y in heights)
    assert all(4.9 < float(tick) < 5.1 for tick in ticks(chart))
    # zero has no relative size
    assert ticks(svg_chart("a", records([0.0] * 9))) == ["0", "0.5", "1"]


def test_baselines_are_inside_the_plot_and_their_labels_do_not_overlap() -> None:
    chart = svg_chart("eval/knn_20", records([0.7, 0.72, 0.74], "eval/knn_20"), [
        Baseline("untrained", 0.30), Baseline("pixels", 0.29)], (0, 0.30))  # fmt: skip
    lines = [each for each in parse(chart).iter("line") if each.get("class") == "base"]
    assert [0 < float((each.get("y1") or "").rstrip("%")) < 100 for each in lines] == [True, True]
    labels = [each for each in parse(chart).iter("text") if each.get("class") == "named"]
    assert [each.text for each in labels] == ["untrained 30.0%", "pixels 29.0%"]
    shifts = [float((each.get("dy") or "").removesuffix("em")) for each in labels]
    # the lower one has its label below its line
    assert shifts[0] < 0 < shifts[1]
    assert ticks(chart)[0].endswith("%") and curve(chart)[0][0] == 0 and len(curve(chart)) == 4


def test_a_spike_is_neither_lost_nor_flattens_the_curve() -> None:
    values: list[float | None] = [10.0 - step / 1000 for step in range(10_000)]
    values[5000] = 1e6
    chart = svg_chart("a", records(values))
    heights = [y for _, y in curve(chart)]
    assert len(heights) <= MAX_POINTS + 2 and max(heights) > 800 and len(chart) < 16_000
    raw = next(parse(chart).iter("polyline")).get("points", "")
    assert ",-1000" in raw


def test_values_over_decades_have_a_logarithmic_axis() -> None:
    values: list[float | None] = [10 ** (2 - step / 100) for step in range(401)]
    chart = svg_chart("optim/gradient_norm", records(values, "optim/gradient_norm"))
    assert ticks(chart) == ["0.01", "0.1", "1", "10", "100"]
    heights = [y for _, y in curve(chart)]
    assert heights[len(heights) // 2] == pytest.approx(500, abs=30)
    # but not a schedule that starts at zero, and not negative values
    assert "0.1" not in ticks(svg_chart("optim/lr", records(values, "optim/lr")))
    assert svg_chart("loss/total", records([-1.0, 100.0], "loss/total"))


def test_few_values_are_marked_and_units_are_shown() -> None:
    few = svg_chart("memory/rss_bytes", records([2e9] * MAX_MARKED, "memory/rss_bytes"))
    assert few.count("<circle") == MAX_MARKED and "2 GB at step 12" in few
    many = svg_chart("speed/step_seconds", records([0.25] * 40, "speed/step_seconds"))
    assert many.count("<circle") == 1 and "250.0 ms at step 40" in many
    assert re.search(r'aria-label="Step time: 250.0 ms at step 40"', many)
