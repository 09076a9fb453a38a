"""``streamtrain report`` on a small run: one self-contained page with everything that was logged."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from commands import exit_status
from tiny_backbone import tiny_config

from streamtrain.config.load import build, load_config, to_yaml
from streamtrain.evaluation.report import report_page
from streamtrain.reporting.sink import MetricsSink
from streamtrain.run.directory import describe_run


class Page(HTMLParser):
    """Collect the text, the links and the charts of a page, and check that its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        # of each chart: whether it is folded, and its label for screen readers
        self.charts: list[tuple[bool, str]] = []
        self.words = self.style = ""
        self.feed(text)
        assert self.open == [] and "script" not in self.tags

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        self.charts += [("details" in self.open, value or "") for name, value in attributes if name == "aria-label"]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
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
    page = Page((tmp_path / "page.html").read_text())
    assert all(source.startswith("data:") for source in page.sources)
    assert sum(source.startswith("data:image/png") for source in page.sources) == 1
    assert [(folded, label.partition(":")[0]) for folded, label in page.charts] == [
        (False, "kNN accuracy (k = 20)"), (False, "Loss"), (False, "Speed"),
        (True, "Step time"), (True, "Wait for images"), (True, "Host memory, peak"),
    ]  # fmt: skip
    headings = [tag for tag in page.tags if tag in ("h1", "h2", "h3")]
    assert headings[0] == "h1" and set(headings[1:]) == {"h2"}
    for words in (
        "Run run <1>",
        "Inputs of the network at step 5",
        "10.0 s",
        "25.0%",
        "9.000 → 1.800",
        "<script>",
        "40",
        "1.07 GB",
        "TFLOP",
        "10.0% (step 1)",
        "50.0% (step 5)",
        "The starting network was not evaluated",
        "40 images seen",
        "No step was skipped as non-finite; no warning of a collapse",
    ):
        assert words in page.words, words


def test_a_missing_run_is_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["report", "--run", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: nowhere is not a run ") and error.count("\n") == 1


MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def hostile_run(folder: Path, name: str, metrics: dict[str, float] | None = None, **files: bytes) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    describe_run(run, tiny_config(), 1, {"device": "cpu", "dtype": "fp32"})
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "slot": 8, "loss/total": 1.0, **(metrics or {})}) + "\n")
    for path, content in files.items():
        (run / path.replace("__", ".")).write_bytes(content)
    return run


def test_code_that_a_run_names_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("planted.py").write_text("open('executed', 'w')\n")
    settings = to_yaml(tiny_config()) + "\n"
    named = settings.replace("factory: null", "factory: planted:Backbone")
    named = named.replace("augmentations: null", "augmentations: planted:augment")
    assert named.count("planted") == 2
    run = hostile_run(tmp_path, "run", config__yaml=named.encode())
    assert exit_status(["report", "--run", str(run)]) == 0
    assert "the plan is left out: its network is code of the run's author, planted:Backbone" in capsys.readouterr().err
    assert not Path("executed").exists()


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
    assert "from the first to the last step" in (run / "report.html").read_text()


def test_text_is_escaped_and_only_harmless_pictures_are_shown(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, "run " + MARKUP.replace("/", "_"), {f"loss/{MARKUP}": 1.0, f"eval/{MARKUP}": 0.5})
    (run / "config.yaml").write_bytes((run / "config.yaml").read_bytes() + f"# {MARKUP}\x1b[2J".encode())
    records = [{"step": 1, "slot": 8, f"loss/{MARKUP}": 1.0, f"eval/{MARKUP}": 0.5, "loss/total": 1e308}]
    images = {MARKUP: (1, b"<svg onload=alert(3)>"), f"jpeg {MARKUP}": (2, b"\xff\xd8\xff" + bytes(9))}
    text = report_page(run, records, images)
    assert "<script>" not in text and "<img src=x" not in text and "\x1b" not in text and "onload" not in text
    page = Page(text)
    assert sum(source.startswith("data:image/jpeg;base64,") for source in page.sources) == 1


def test_many_tags_take_seconds_and_are_counted(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, "run", {f"loss/{index}": 1.0 for index in range(3000)} | {"speed/x": 1.0})
    began = time.process_time()
    assert exit_status(["report", "--run", run]) == 0
    assert time.process_time() - began < 30
    text = (run / "report.html").read_text()
    assert "and 2,941 more tags in metrics.jsonl" in text and 'aria-label="speed/x: 1' in text


def evaluated_run(folder: Path, last: float, baselines: object, **settings: object) -> Path:
    run = hostile_run(folder, "run")
    sections = {"run": {"steps": 300, "dir": str(run)}, "data": {"shards": "sets/photos"}, **settings}
    describe_run(run, build(sections), 1, {"device": "cpu", "dtype": "fp32", "images": 600})
    values = {step: 0.3 + (last - 0.3) * step / 300 for step in range(50, 301, 50)}
    lines = [{"step": step, "slot": 8 * step, "loss/total": 2.0, "optim/skipped_steps": 0.0} for step in range(1, 301)]
    records = [line | ({"eval/knn_20": values[line["step"]]} if line["step"] in values else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "baselines.json").write_text(json.dumps(baselines))
    return run


def known(start: float, pixels: float, images: int = 200) -> dict[str, object]:
    return {"start": {"eval/knn_20": start}, "pixels": {"eval/knn_20": pixels}, "test_images": images}


@pytest.mark.parametrize(
    ("last", "baselines", "words"),
    [
        (0.9, known(0.5, 0.4), "It learned"),
        (0.6, known(0.56, 0.46), "No measurable difference from the untrained network"),
        # the same values on many images
        (0.6, known(0.56, 0.46, 20_000), "It learned"),
        (0.9, known(0.5, 0.92), "Better than the untrained network, but not than pixels"),
        (0.3, known(0.6, 0.2), "Worse than the untrained network"),
        (0.9, "damaged", "No baseline"),
        (0.9, {"start": {"eval/knn_20": "0.5"}, "pixels": {}, "test_images": 1}, "No baseline"),
        (0.9, {"start": {"eval/knn_20": 1e300}, "pixels": [], "test_images": -1}, "No baseline"),
    ],
)
def test_the_verdict_compares_with_the_baselines(last: float, baselines: object, words: str, tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, last, baselines)
    assert exit_status(["report", "--run", run]) == 0
    page = Page((run / "report.html").read_text())
    assert words in page.words and f"{last:.1%}" in page.words
    if words != "No baseline":
        assert "± " in page.words and "test images; differences below" in page.words


def test_baselines_are_labelled_lines_and_the_curve_starts_at_the_start(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, 0.9, known(0.5, 0.4))
    assert exit_status(["report", "--run", run]) == 0
    text = (run / "report.html").read_text()
    (chart,) = (figure for figure in text.split("<figure")[1:] if 'aria-label="kNN accuracy (k = 20)' in figure)
    assert chart.count('class="base"') == 2 and ">untrained 50.0%<" in chart and ">pixels 40.0%<" in chart
    assert 'class="band"' in chart and '<circle cx="0.0%"' in chart
    # the same for a run that started from weights
    weights = evaluated_run(tmp_path / "other", 0.9, known(0.5, 0.4), init={"weights": "w"})
    assert exit_status(["report", "--run", weights]) == 0
    assert ">initial 50.0%<" in (weights / "report.html").read_text()
    # and for one that began with another run's checkpoint
    resumed = evaluated_run(tmp_path / "resumed", 0.9, known(0.5, 0.4) | {"step": 40, "is_trained": True})
    assert exit_status(["report", "--run", resumed]) == 0
    text = (resumed / "report.html").read_text()
    assert ">initial 50.0%<" in text and ">step 40<" in text


def test_the_page_opens_with_recipe_data_and_hardware(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, 0.9, known(0.5, 0.4))
    config = load_config("quickstart.yaml", ["run.steps=400", "data.shards=sets/photos", "optim.clip=1.0"])
    describe_run(run, config, 1, {"device": "cpu", "dtype": "fp32", "images": 600})
    assert exit_status(["report", "--run", run]) == 0
    page = Page((run / "report.html").read_text())
    opening = page.words[: page.words.index("It learned")]
    for words in (
        "quickstart.yaml with run.steps=400, optim.clip=1.0", "600 images from sets/photos", "1 rank", "fp32", "UTC",
        "300 of 400 steps, 2,400 images seen = 4 epochs", "none yet",
    ):  # fmt: skip
        assert words in opening, words
    assert "prefers-color-scheme: dark" in page.style and "overflow-x: auto" in page.style
    # charts have no colours of their own
    assert "#" not in "".join((run / "report.html").read_text().split("<figure")[1:]).partition("</svg></figure>")[0]


def test_warnings_of_the_run_are_listed_and_a_collapse_is_the_verdict(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, 0.9, known(0.5, 0.4))
    (run / "x").mkdir()
    sink = MetricsSink(run / "x", build({"monitor": {"progress": False}}), rank=0, start_step=0)
    sink.warn(120, "step 120: the features are nearly equal; training may be collapsing <b>")
    sink.close()
    (run / "x" / "tensorboard").rename(run / "tensorboard")

    def words_of_report(collapse: dict[int, float]) -> str:
        lines = [json.dumps({"step": step, "slot": step, "watch/collapse": collapse.get(step)}) for step in (119, 120)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        assert exit_status(["report", "--run", run]) == 0
        return Page((run / "report.html").read_text()).words

    words = words_of_report({119: 0.0, 120: 2.0})
    assert "Signs of collapse" in words and "since step 120" in words and "collapsing <b>" in words
    assert "1 warning, listed below; none of a collapse" in words_of_report({119: 0.0, 120: 0.0})
    # a run of an earlier version recorded no number: its warnings are listed without a judgement
    words = words_of_report({})
    assert "1 warning, listed below." in words and "collapsing <b>" in words


def test_the_page_names_a_fault_with_its_metric_and_advice(tmp_path: Path) -> None:
    run = evaluated_run(tmp_path, 0.9, known(0.5, 0.4))
    assert exit_status(["report", "--run", run]) == 0
    assert "Too early to judge the run's health" in Page((run / "report.html").read_text()).words
    lines = [json.dumps({"step": step, "slot": step, "data/pixel_std": 60.0}) for step in range(1, 9)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert exit_status(["report", "--run", run]) == 0
    words = Page((run / "report.html").read_text()).words
    assert "normalisation look wrong" in words and "60 (data/pixel_std)" in words and "crops.std may be" in words


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, "run")
    rng = np.random.default_rng(0)
    records = [
        {"step": step, "slot": step, "loss/total": value, "optim/lr": 1e-3, "memory/rss_bytes": 2e9}
        for step, value in enumerate(rng.normal(size=30_000).tolist(), 1)
    ]
    text = report_page(run, records, {})
    assert len(text) < 60_000
    # a constant is not magnified: its axis ends within a few per cent
    (chart,) = (figure for figure in text.split("<figure")[1:] if 'aria-label="Learning rate' in figure)
    ticks = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert ticks and all(abs(float(tick) - 1e-3) < 5e-5 for tick in ticks)


def test_a_link_named_report_is_replaced(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, "run")
    (tmp_path / "precious").write_text("precious")
    (run / "report.html").symlink_to(tmp_path / "precious")
    assert exit_status(["report", "--run", run]) == 0
    assert (tmp_path / "precious").read_text() == "precious" and not (run / "report.html").is_symlink()


def test_only_pages_are_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = hostile_run(tmp_path, "run")
    for name in ("metrics.jsonl", "config.yaml"):
        before = (run / name).read_bytes()
        assert exit_status(["report", "--run", run, "--out", run / name]) == 2
        assert (run / name).read_bytes() == before
        assert f"{name} exists and is not an HTML page; choose another --out" in capsys.readouterr().err
    (tmp_path / "empty.html").touch()
    for _ in range(2):
        assert exit_status(["report", "--run", run, "--out", tmp_path / "empty.html"]) == 0
