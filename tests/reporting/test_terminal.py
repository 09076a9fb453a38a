"""A bar on a terminal, lines in a log, nothing where nothing is wanted."""

from __future__ import annotations

import io

from streamtrain.reporting.terminal import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO, shown: bool = True) -> str:
    with progress_bar("reading", 5000, "images", shown=shown, stream=stream) as bar:
        for _ in range(5000):
            bar.update(1)
    return stream.getvalue()


def test_a_log_gets_few_lines_and_a_terminal_a_bar() -> None:
    first, last = drawn(io.StringIO()).splitlines()
    assert first.startswith("reading: 0/5000 images") and last.startswith("reading: 5000/5000 images")
    assert "\r" not in first + last
    assert "\rreading: 100%" in drawn(Terminal())
    assert drawn(io.StringIO(), shown=False) == drawn(Terminal(), shown=False) == ""
