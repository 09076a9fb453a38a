"""``metrics.jsonl``: one JSON object per completed step; truncated on resume."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import printable
from shards.format.append_log import AppendLog
from shards.format.files import create_file, parse_json, partial_path

# a longer line is not a record
_MAX_LINE_BYTES = 1 << 20
_MAX_STEP = 2**53
logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends lines, each in one unbuffered write, so that a killed run tears at most the last line.

    While the disk is full or fails, lines are kept in memory.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        """Remove lines after ``start_step``, now or, if the disk fails, before the first line is written."""
        self._log = AppendLog(path, prepare=partial(truncate_after, path, start_step))
        self._log.flush()

    def write(self, step: int, slot: int, scalars: Mapping[str, float]) -> None:
        """Write ``step``, ``slot`` and the scalars by tag at full precision; non-finite values become null."""
        values = {tag: value if math.isfinite(value) else None for tag, value in scalars.items()}
        line = json.dumps({"step": step, "slot": slot, **values}, allow_nan=False)
        self._log.append(line.encode() + b"\n")

    def close(self) -> None:
        self._log.close()


def read_metrics(path: Path, stride: int = 1) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file in order: ``step``, ``slot``, and each scalar as a float or None.

    Of the lines without collapse metrics, only each ``stride``-th is read.

    Invalid lines and values are skipped, and lines are counted in a warning. A torn last line is expected: the run was
    killed, or is still writing it.
    """
    num_skipped = 0
    with path.open("rb") as file:
        for number, (_, line) in enumerate(_lines(file)):
            if number % stride and b'"watch/collapse"' not in line:
                continue
            record = _parse(line)
            if record is not None:
                yield _clean(record)
            elif line.endswith(b"\n"):
                num_skipped += 1
    if num_skipped:
        logger.warning("%s: %d invalid lines were skipped", path, num_skipped)


def truncate_after(path: Path, step: int) -> None:
    """Remove torn lines and lines after ``step``; without such lines the file is not changed. Raises OSError."""
    if not path.exists():
        return
    # end of the last line to keep, and start of the current line
    end = position = 0
    is_prefix = True
    with path.open("rb") as file:
        for num_bytes, line in _lines(file):
            if _is_kept(line, step):
                is_prefix = is_prefix and end == position
                end = position + num_bytes
            position += num_bytes
    if not is_prefix:
        _rewrite(path, step)
    elif end < position:
        # needs no space on the disk
        os.truncate(path, end)


def _rewrite(path: Path, step: int) -> None:
    """Replace the file by its lines up to ``step``, atomically."""
    partial = partial_path(path)
    try:
        with path.open("rb") as file, open(create_file(partial), "wb") as kept:
            kept.writelines(line for _, line in _lines(file) if _is_kept(line, step))
            kept.flush()
            os.fsync(kept.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield length and content of each line; of a longer one than ``_MAX_LINE_BYTES`` only the line break, if any."""
    num_bytes = 0
    while piece := file.readline(_MAX_LINE_BYTES):
        is_first, num_bytes = num_bytes == 0, num_bytes + len(piece)
        if piece.endswith(b"\n") or len(piece) < _MAX_LINE_BYTES:
            yield num_bytes, piece if is_first else piece[-1:]
            num_bytes = 0
    if num_bytes:
        yield num_bytes, b""


def _is_kept(line: bytes, step: int) -> bool:
    record = _parse(line)
    return record is not None and bool(record["step"] <= step)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(step := record.get("step")) is not int:
        return None
    return record if 0 <= step <= _MAX_STEP else None


def _clean(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with tags that are safe to print, and without values that are not numbers."""
    slot = record.get("slot")
    cleaned: dict[str, Any] = {"step": record["step"], "slot": slot if type(slot) is int else 0}
    for tag, value in record.items():
        if tag not in cleaned and (value is None or _is_number(value)):
            cleaned[printable(tag)] = value
    return cleaned


def _is_number(value: object) -> bool:
    """Return whether ``value`` is finite as a float."""
    try:
        return type(value) in (int, float) and math.isfinite(float(value))  # type: ignore[arg-type]
    except OverflowError:
        return False
