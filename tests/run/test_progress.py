"""Progress bars on a terminal, lines in a log file, and nothing if disabled."""

from __future__ import annotations

import io

from streamtrain.run.progress import TrainingProgress, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
