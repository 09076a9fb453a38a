"""Images in a column of Parquet files, in the layout of Hugging Face data sets; read with pyarrow.

The image column holds the encoded bytes, or structs of ``bytes`` and ``path``. Labels are names or whole numbers, whose
names may be in Hugging Face's metadata; -1, null and NaN mean no label.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import ShardError
from shards.format.tally import Tally
from shards.format.tar_members import NO_LABEL, check_label
from shards.packing.items import MAX_ITEMS, Inputs, Item, SourceUnreachable, number_classes, read_source
from shards.storage.store import BULK_POLICY, Store, is_url

SUFFIX = ".parquet"
_LABEL_COLUMN = "label"
# Rows that all fit into one compressed page, such as nulls, cost nothing in the file and a few hundred bytes of memory.
_FREE_ROWS = 1_000_000
_MIN_BYTES_PER_ROW = 8  # of the file, beyond the free rows
_MAX_GROUP_BYTES = 8 << 30  # of the images of one row group, which are in memory at once
_MAX_LABEL_CHARACTERS = 4096
_IMAGES_PER_BATCH = 64
_LABELS_PER_BATCH = 4096

Result = TypeVar("Result")


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read."""

    image: str | None = None  # None: the only column with images
    label: str | None = None  # None: the column "label" if it exists; empty: no labels


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """The image in one row."""

    location: str  # path or URL of the file
    column: str
    group: int  # row group
    row: int  # in the group

    @property
    def identity(self) -> str:
        return f"{self.column}\t{self.group}\t{self.row}"

    def read(self) -> bytes:
        # one read serves all rows of a row group
        column = _read_column(self.location, self.column, self.group)
        if self.row >= len(column):
            raise ShardError(f"row group {self.group} has fewer rows than it states")
        cell = column[self.row].as_py()
        if isinstance(cell, dict):
            cell, path = cell["bytes"], cell.get("path")
            if cell is None and path:
                raise ShardError(f"the cell has no bytes, only the path {path}; embed the files in the data set")
        if cell is None:
            raise ShardError("the cell is empty")
        return bytes(cell)


def list_parquet(locations: Sequence[str], names: Sequence[str], columns: Columns, passed_over: Tally) -> Inputs:
    """List the images of Parquet files.

    Args:
        locations: paths or URLs of the files.
        names: names of the same files, for sample keys and messages.
        passed_over: other files in the source.

    Raises:
        ShardError: pyarrow is missing, a file is damaged or has more rows than images, or a column is missing or has
            invalid values.
    """
    items: list[Item] = []
    runs: list[int] = []
    labels: list[Any] = []
    class_names: tuple[str, ...] = ()
    for location, name in zip(locations, names, strict=True):
        file = _open_file(location)
        column = columns.image or _only_image_column(file, location)
        _check_image_column(file, column, location)
        label = _LABEL_COLUMN if columns.label is None and _LABEL_COLUMN in file.schema_arrow.names else columns.label
        if label and label not in file.schema_arrow.names:
            raise ShardError(f"{location} has no column {label!r}; it has {', '.join(file.schema_arrow.names)}")
        _check_rows(file, location, len(items))
        class_names = class_names or _class_names(file, label)
        labels += _read_labels(location, label) if label else [None] * file.metadata.num_rows
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        runs += sizes
        cells = (ParquetCell(location, column, group, row) for group, size in enumerate(sizes) for row in range(size))
        items += (Item(f"{name}/{number}", NO_LABEL, cell) for number, cell in enumerate(cells))
    numbers, classes = _number_labels(labels, class_names)
    labelled = (Item(item.name, label, item.location) for item, label in zip(items, numbers, strict=True))
    return Inputs(tuple(labelled), classes, passed_over, tuple(run for run in runs if run))


def _read_labels(location: str, column: str) -> list[int | str | None]:
    file = _open_file(location)

    def read() -> list[int | str | None]:
        labels: list[int | str | None] = []
        # in batches, because a few bytes can hold a value that all rows repeat
        for batch in file.iter_batches(_LABELS_PER_BATCH, columns=[column]):
            labels.extend(_parse_label(value, name) for value in batch.column(0).to_pylist())
        if len(labels) != file.metadata.num_rows:
            raise _DamagedFile(f"{name} has {len(labels)} rows instead of {file.metadata.num_rows}; fetch it again")
        return labels

    name = f"{location}: column {column!r}"
    try:
        return _read_file(location, read)
    except _InvalidLabel as error:
        raise ShardError(f"{error}; name another column with --label-column, or '' for no labels") from error


def _parse_label(value: Any, name: str) -> int | str | None:
    if isinstance(value, str) and len(value) > _MAX_LABEL_CHARACTERS:
        raise _InvalidLabel(f"{name} contains names of {len(value)} characters")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (int, float, Decimal)):
        raise _InvalidLabel(f"{name} contains {type(value).__name__}, not numbers or names")
    try:
        # pandas writes missing numbers as NaN
        return None if math.isnan(value) else check_label(value, name)
    except ShardError as error:
        raise _InvalidLabel(str(error)) from error


def _check_rows(file: Any, location: str, num_before: int) -> None:
    """Raise a ShardError if a file has more rows than can be images, or more than fit into memory."""
    rows, sizes = file.metadata.num_rows, [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    if rows < 0 or rows != sum(group.num_rows for group in sizes) or any(group.num_rows < 0 for group in sizes):
        raise ShardError(
            f"{location} is damaged: its {rows} rows differ from the sum over its row groups; fetch it again"
        )
    if rows > _FREE_ROWS and rows * _MIN_BYTES_PER_ROW > (num_bytes := _file_bytes(location)):
        raise ShardError(f"{location} states {rows} rows in {num_bytes} bytes, too few to hold as many images")
    if num_before + rows > MAX_ITEMS:
        raise ShardError(f"{location} brings the number of rows above {MAX_ITEMS}; make several sets of the files")


def _file_bytes(location: str) -> int:
    if not is_url(location):
        return Path(location).stat().st_size
    folder, _, name = location.rpartition("/")
    return Store(folder, BULK_POLICY).size(name)


def _number_labels(
    labels: Sequence[int | str | None], class_names: tuple[str, ...]
) -> tuple[list[int], tuple[str, ...]]:
    """Return the labels as numbers, and the class names; ``class_names`` applies to numeric labels."""
    names = [label for label in labels if isinstance(label, str)]
    numbers = [NO_LABEL if label is None else label for label in labels if not isinstance(label, str)]
    if not names:
        return numbers, class_names
    if any(label != NO_LABEL for label in numbers):
        raise ShardError("some Parquet files have numbers as labels, others names; pack them separately")
    classes, numbers = number_classes([label if isinstance(label, str) else None for label in labels])
    return numbers, classes


def _only_image_column(file: Any, location: str) -> str:
    candidates = [name for name in file.schema_arrow.names if _holds_images(file, name)]
    if len(candidates) != 1:
        problem = f"several columns of bytes ({', '.join(candidates)})" if candidates else "no column of bytes"
        raise ShardError(f"{location} has {problem}; give the image column with --image-column")
    return str(candidates[0])


def _check_image_column(file: Any, column: str, location: str) -> None:
    if column not in file.schema_arrow.names:
        raise ShardError(f"{location} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
    if not _holds_images(file, column):
        raise ShardError(
            f"{location}: column {column!r} contains {file.schema_arrow.field(column).type}, not bytes or structs "
            "of bytes and path; give another with --image-column"
        )


def _holds_images(file: Any, column: str) -> bool:
    types = _pyarrow().types
    kind = file.schema_arrow.field(column).type
    if types.is_struct(kind):
        fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        kind = fields.get("bytes")
    return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind))


def _class_names(file: Any, label: str | None) -> tuple[str, ...]:
    """Return the class names of the label column from Hugging Face's metadata; empty if there are none."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()


@lru_cache(maxsize=2)
def _read_column(location: str, column: str, group: int) -> Any:
    """Read the image column of a row group, cached for its next rows."""
    file = _open_file(location)

    def read() -> Any:
        # in batches, because a few bytes can hold an image that all rows repeat
        batches, num_bytes = [], 0
        for batch in file.iter_batches(_IMAGES_PER_BATCH, row_groups=[group], columns=[column]):
            batches.append(batch.column(0))
            num_bytes += batch.nbytes
            if num_bytes > _MAX_GROUP_BYTES:
                raise _DamagedFile(
                    f"{location}: the images of row group {group} have more than {_MAX_GROUP_BYTES} bytes; write it "
                    "again with smaller row groups"
                )
        return _pyarrow().chunked_array(batches)

    return _read_file(location, read)


@lru_cache(maxsize=4)
def _open_file(location: str) -> Any:
    parquet = _pyarrow().parquet
    if is_url(location):
        folder, _, name = location.rpartition("/")
        source: Any = Store(folder, BULK_POLICY).open(name)
    else:
        source = location
    return _read_file(location, lambda: parquet.ParquetFile(source))


class _DamagedFile(ShardError):
    """The file was received in full and is damaged."""


class _InvalidLabel(_DamagedFile):
    """The label column has a value that is not a label."""


def _read_file(location: str, read: Callable[[], Result]) -> Result:
    """Return ``read()``, retried for a file in a store; errors name the file."""

    def attempt() -> Result:
        try:
            return read()
        except _pyarrow().ArrowInvalid as error:
            raise _DamagedFile(f"{location} cannot be read ({_one_line(error)}); upload it again") from error

    try:
        if not is_url(location):
            return read_source(location, read)
        folder, _, name = location.rpartition("/")
        return Store(folder, BULK_POLICY).retry(name, attempt)
    except ShardError as error:
        if isinstance(error, (_DamagedFile, SourceUnreachable)) or not is_url(location):
            raise
        raise SourceUnreachable(f"{error}; once it can be read, re-run to resume") from error
    except (ValueError, OSError) as error:  # pyarrow's errors are among these
        raise ShardError(f"{location} cannot be read ({_one_line(error)}); fetch it again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ShardError(f"Parquet files need pyarrow: pip install pyarrow ({error})") from error
    return pyarrow
