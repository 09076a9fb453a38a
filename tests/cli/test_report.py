"""``streamtrain report`` on a small run: one self-contained page with everything that was logged."""

from __future__ import annotations

import json
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from commands import exit_status
from tiny_backbone import tiny_config

from streamtrain.config.load import build, to_yaml
from streamtrain.evaluation.report import report_page
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


MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def hostile_run(folder: Path, name: str, metrics: dict[str, float] | None = None, **files: bytes) -> Path:
    run = folder / name
    run.mkdir()
    describe_run(run, tiny_config(), 1, {"device": "cpu", "dtype": "fp32"})
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "slot": 8, "loss/total": 1.0, **(metrics or {})}) + "\n")
    for path, content in files.items():
        (run / path.replace("__", ".")).write_bytes(content)
    return run


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("environment__json", b'{"x'), ("environment__json", b"[]"), ("environment__json", b'{"world_size": "zero"}'),
        ("environment__json", b'{"world_size": 0}'), ("environment__json", b'{"world_size": 1e400}'),
        ("environment__json", b"[" * 100_000), ("config__yaml", b"\xff\xfe\x00"),
        ("config__yaml", b"a: " + b"[" * 5000),
        ("config__yaml", b"model: {depth: 99999999999999999999}"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_left_out(
    file: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = hostile_run(tmp_path, "run", **{file: content})
    assert exit_status(["report", "--run", run]) == 0
    captured = capsys.readouterr()
    assert "the plan is left out: " in captured.err + captured.out and "Traceback" not in captured.err
    assert "loss, first to last" in (run / "report.html").read_text()


def test_text_is_escaped_and_only_harmless_pictures_are_shown(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, "run " + MARKUP.replace("/", "_"), {f"loss/{MARKUP}": 1.0, f"eval/{MARKUP}": 0.5})
    (run / "config.yaml").write_bytes((run / "config.yaml").read_bytes() + f"# {MARKUP}\x1b[2J".encode())
    records = [{"step": 1, "slot": 8, f"loss/{MARKUP}": 1.0, f"eval/{MARKUP}": 0.5, "loss/total": 1e308}]
    images = {MARKUP: (1, b"<svg onload=alert(3)>"), f"jpeg {MARKUP}": (2, b"\xff\xd8\xff" + bytes(9))}
    text = report_page(run, records, images)
    assert "<script>" not in text and "<img src=x" not in text and "\x1b" not in text and "svg" not in text
    page = Page()
    page.feed(text)
    assert page.open == [] and sum(source.startswith("data:image/jpeg;base64,") for source in page.sources) == 1


def test_many_tags_take_seconds_and_are_counted(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, "run", {f"loss/{index}": 1.0 for index in range(3000)} | {"speed/x": 1.0})
    began = time.process_time()
    assert exit_status(["report", "--run", run]) == 0
    assert time.process_time() - began < 30
    text = (run / "report.html").read_text()
    assert "and 2,941 more tags in metrics.jsonl" in text and 'alt="speed/x"' in text


def test_a_link_named_report_is_replaced(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, "run")
    (tmp_path / "precious").write_text("precious")
    (run / "report.html").symlink_to(tmp_path / "precious")
    assert exit_status(["report", "--run", run]) == 0
    assert (tmp_path / "precious").read_text() == "precious" and not (run / "report.html").is_symlink()
