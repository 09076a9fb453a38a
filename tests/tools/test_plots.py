"""Plots of result files: every point and name is inside the picture."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from ranks import ROOT

VALUES = st.none() | st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(st.integers(0, 10**6), VALUES, VALUES), min_size=1, max_size=9), st.text("a<&é", min_size=1))
def test_curves_stay_inside_the_picture(rows: list[tuple[int, float | None, float | None]], name: str) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    from benchmarks.plots import HEIGHT, WIDTH, line_plot

    plot = {"title": name, "x": "step", "series": {name: "a", "other": "b"}, "levels": {"pixels": 0.5}}
    rows = [*rows, (10, 1.0, 2.0)]
    picture = ElementTree.fromstring(line_plot([{"name": "step"}, {"name": "a"}, {"name": "b"}], rows, plot))
    pairs = [(float(node.attrib["cx"]), float(node.attrib["cy"])) for node in picture.iter() if "cx" in node.attrib]
    assert len(pairs) == sum(value is not None for row in rows for value in row[1:])
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pairs)
    texts = ["".join(node.itertext()) for node in picture.iter() if node.tag.endswith("text")]
    assert {name, "other", "pixels"} <= set(texts)
