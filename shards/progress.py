"""The size of progress bars on a terminal."""

from __future__ import annotations

import os
import sys
from typing import TextIO, TypedDict

# of a terminal that does not report its size, such as one of a container or of `ssh -tt`
USUAL_COLUMNS, USUAL_ROWS = 80, 24


class BarSize(TypedDict):
    """Arguments of tqdm."""

    ncols: int
    nrows: int


def bar_size(stream: TextIO | None = None) -> BarSize:
    """Return the ``ncols`` and ``nrows`` of a tqdm bar on ``stream`` (default: stderr).

    tqdm takes a size of 0 literally, and then draws no bar.
    """
    try:
        columns, rows = os.get_terminal_size((stream or sys.stderr).fileno())
    except (OSError, ValueError):
        columns = rows = 0
    return {"ncols": columns or USUAL_COLUMNS, "nrows": rows or USUAL_ROWS}
