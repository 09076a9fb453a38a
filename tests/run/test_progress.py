"""Progress bars on a terminal, lines in a log file, and nothing if disabled."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import struct
import termios
from pathlib import Path

import pytest

from streamtrain.run import progress as progress_module
from streamtrain.run.progress import Evaluations, TrainingProgress, fitting, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read_terminal(leader: int) -> str:
    """Return everything that was written to a terminal so far."""
    content = b""
    while select.select([leader], [], [], 0.2)[0]:
        content += os.read(leader, 1 << 16)
    return content.decode()


def bar_output(stream: io.StringIO, shown: bool = True) -> str:
    with progress_bar("reading", 5000, "images", shown=shown, stream=stream) as bar:
        for _ in range(5000):
            bar.update(1)
    return stream.getvalue()


def test_log_file_gets_few_lines_and_terminal_a_bar() -> None:
    first, last = bar_output(io.StringIO()).splitlines()
    assert first.startswith("reading: 0/5000 images") and last.startswith("reading: 5000/5000 images")
    assert "\r" not in first + last
    assert "\rreading: 100%" in bar_output(Terminal())
    assert bar_output(io.StringIO(), shown=False) == bar_output(Terminal(), shown=False) == ""


def test_no_line_of_a_log_file_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.0)
    stream = io.StringIO()
    with progress_bar("reading a, b", 3, "images", stream=stream) as bar:
        for _ in range(3):
            bar.update(1)
    counts = [line.split(" images")[0] for line in stream.getvalue().splitlines()]
    assert counts == [f"reading a, b: {count}/3" for count in range(4)]


@pytest.mark.parametrize("size", [(0, 0), (24, 0), (0, 80)])
def test_a_terminal_without_a_size_shows_bars(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with open(follower, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)  # tqdm reads the size of stderr and stdout only
        training = TrainingProgress(2, 0)
        training.update(2, {"loss/total": 2.5})
        training.close()
        assert "step 2/2, loss 2.5000" in read_terminal(leader)
        with progress_bar("reading", 2, "images") as bar:
            bar.update(2)
        assert "2/2 [00:00<00:00" in read_terminal(leader)
    os.close(leader)


def test_training_progress_in_a_log_file_is_a_line_every_few_seconds() -> None:
    stream = io.StringIO()
    progress = TrainingProgress(200, 100, stream)
    for step in range(101, 201):
        progress.update(step, {"loss/total": 2.5, "speed/images_per_second": 31.25})
    progress.close()
    first, last = stream.getvalue().splitlines()
    assert first.startswith("step 101/200: loss 2.5000, 31.2 images/s, ")
    assert last == "step 200/200: loss 2.5000, 31.2 images/s, 00:00 left" and "\r" not in stream.getvalue()


def test_training_progress_on_a_terminal_is_one_bar() -> None:
    stream = Terminal()
    progress = TrainingProgress(4, 1, stream)
    for step in (2, 3, 4):
        progress.update(step, {"loss/total": 2.5})
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "4/4" in last and "loss 2.5000" in last


def test_an_evaluation_is_a_line_at_once_and_stays_in_the_progress() -> None:
    for stream in (io.StringIO(), Terminal()):
        progress = TrainingProgress(200, 0, stream)
        for step, knn in ((40, 0.5), (80, 0.75), (120, 0.625)):
            progress.update(step, {"loss/total": 2.5, "eval/knn_10": knn, "eval/seconds": 1.0})
        progress.update(121, {"loss/total": 2.5})
        progress.update(200, {"loss/total": 2.5})
        progress.close()
        lines = [line.split("\r")[-1].strip() for line in stream.getvalue().rstrip().split("\n")]
        for step, text in (
            (40, "kNN 50.0% (best so far)"), (80, "kNN 75.0% (best so far)"),
            (120, "kNN 62.5% (best 75.0% at step 80)"),
        ):  # fmt: skip
            assert any(line.startswith(f"step {step}") and line.endswith(text) for line in lines), lines
        assert len(lines) == 4
        assert "kNN 62.5%" in lines[-1] and lines[-1].startswith("step 200/200")


def test_a_resumed_run_knows_its_evaluations(tmp_path: Path) -> None:
    records = [{"step": 1}, {"step": 2, "eval/knn_20": 0.75, "eval/knn_10": 0.5}, {"step": 3, "eval/knn_20": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + '{"eval/')
    evaluations = Evaluations("knn_20")
    evaluations.read(tmp_path / "missing", 3)
    assert evaluations.texts() == []
    evaluations.read(tmp_path / "metrics.jsonl", 3)
    assert evaluations.texts()[0] == "kNN 25.0% at step 3 (best 75.0% at step 2)"
    before = Evaluations()
    before.read(tmp_path / "metrics.jsonl", 2)
    assert before.texts()[0] == "kNN 75.0% at step 2 (best 75.0% at step 2)"


@pytest.mark.parametrize("columns", [10, 20, 40, 60, 80, 120, 200])
def test_the_progress_fits_the_terminal(columns: int) -> None:
    parts = ["step 1200/2000", "loss 7.1234", "12.3 images/s", "03:12 left"]
    evaluations = ["kNN 53.0% at step 40 (best 54.1% at step 20)", "kNN 53.0% at step 40", "kNN 53.0%"]
    text = fitting(parts, evaluations, columns)
    assert len(text) < columns or text == parts[0]
    assert columns < 60 or text.startswith(", ".join(parts))
    assert columns < 120 or text.endswith(evaluations[0])
