"""``streamtrain report`` on a small run: one self-contained page with everything that was logged."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from commands import exit_status
from tiny_backbone import tiny_config

from streamtrain.config.load import build, to_yaml
from streamtrain.reporting.sink import MetricsSink
from streamtrain.run.directory import describe_run


class Page(HTMLParser):
    """Collect the text and the links of a page, and check that its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_page_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run <1>"
    run.mkdir()
    describe_run(run, tiny_config(), 2, {"device": "cpu", "dtype": "fp32"})
    (run / "config.yaml").write_text(to_yaml(tiny_config()) + "# <script>alert(1)</script>\n")
    assert exit_status(["report", "--run", str(run)]) == 2 and "nothing to report yet" in capsys.readouterr().err
    assert not (run / "report.html").exists()
    sink = MetricsSink(run, build({"run": {"steps": 5}, "monitor": {"progress": False}}), rank=0, start_step=0)
    for step in range(1, 6):
        scalars = {"loss/total": 9.0 / step, "speed/step_seconds": 2.0, "data/wait_share": 0.25}
        scalars |= {"speed/images_per_second": 4.0, "memory/peak_rss_bytes": 2.0**30, "eval/knn_20": 0.1 * step}
        sink.log(step, 8 * step, scalars)
    sink.image(1, np.zeros((8, 8, 3), np.uint8))
    sink.image(5, np.full((8, 8, 3), 255, np.uint8))
    sink.close()
    assert exit_status(["report", "--run", str(run), "--out", "nowhere/page.html"]) == 2
    assert "error: cannot write nowhere/page.html (No such file or directory)" in capsys.readouterr().err
    assert exit_status(["report", "--run", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert page.open == []
    assert all(source.startswith("data:") for source in page.sources)
    assert sum(source.startswith("data:image/png") for source in page.sources) == 6 + 1
    for words in (
        "Run run <1>",
        "data/crops, step 5",
        "10 s",
        "25.0%",
        "9.000 → 1.800",
        "1.00 GiB",
        "<script>",
        "40",
        "1.07 GB",
        "TFLOP",
        "10.0% (step 1)",
        "50.0% (step 5)",
    ):
        assert words in page.words, words


def test_a_missing_run_is_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["report", "--run", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nowhere is not a run ") and error.count("\n") == 1
