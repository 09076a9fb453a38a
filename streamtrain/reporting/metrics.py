"""``metrics.jsonl``: one JSON object per completed step; truncated on resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines, each in one unbuffered write, so that a killed run tears at most the last line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, slot: int, scalars: Mapping[str, float]) -> None:
        """Write ``step``, ``slot`` and the scalars by tag at full precision; non-finite values become null."""
        values = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        line = json.dumps({"step": step, "slot": slot, **values}, allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file in order; torn or invalid lines are skipped."""
    with path.open("rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def truncate_after(path: Path, step: int) -> None:
    """Remove torn lines and lines after ``step`` atomically; without such lines the file is not changed."""
    if not path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    cut = False
    with path.open("rb") as file, partial.open("wb") as kept:
        for line in file:
            record = _parse(line)
            if record is not None and record["step"] <= step:
                kept.write(line)
            else:
                cut = True
        kept.flush()
        os.fsync(kept.fileno())
    if cut:
        os.replace(partial, path)
    else:
        partial.unlink()


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
