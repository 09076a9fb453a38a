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
from typing import Any, TypeVar

from shards.errors import ShardError
from shards.format.index import NO_LABEL, check_label
from shards.packing.items import Inputs, Item, SourceUnreachable, number_classes
from shards.storage.store import BULK_POLICY, Store, is_url

SUFFIX = ".parquet"
_LABEL_COLUMN = "label"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read."""

    image: str | None = None  # None: the only column with images
    label: str | None = None  # None: the column "label" if it exists; empty: no labels


@dataclass(frozen=True)
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
        cell = _read_column(self.location, self.column, self.group)[self.row].as_py()
        if isinstance(cell, dict):
            cell, path = cell["bytes"], cell.get("path")
            if cell is None and path:
                raise ShardError(f"the cell has no bytes, only the path {path}; embed the files in the data set")
        if cell is None:
            raise ShardError("the cell is empty")
        return bytes(cell)


def list_parquet(locations: Sequence[str], names: Sequence[str], columns: Columns, num_ignored: int) -> Inputs:
    """List the images of Parquet files.

    Args:
        locations: paths or URLs of the files.
        names: names of the same files, for sample keys and messages.
        num_ignored: number of other files in the source.

    Raises:
        ShardError: pyarrow is missing, a file is damaged, or a column is missing or has invalid values.
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
        class_names = class_names or _class_names(file, label)
        labels += _read_labels(location, label) if label else [None] * file.metadata.num_rows
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        runs += sizes
        cells = (ParquetCell(location, column, group, row) for group, size in enumerate(sizes) for row in range(size))
        items += (Item(f"{name}/{number}", NO_LABEL, cell) for number, cell in enumerate(cells))
    numbers, classes = _number_labels(labels, class_names)
    labelled = (Item(item.name, label, item.location) for item, label in zip(items, numbers, strict=True))
    return Inputs(tuple(labelled), classes, num_ignored, tuple(run for run in runs if run))


def _read_labels(location: str, column: str) -> list[int | str | None]:
    file = _open_file(location)
    values = _read_file(location, lambda: list(file.read([column])[column].to_pylist()))
    try:
        return [_parse_label(value, f"{location}: column {column!r}") for value in values]
    except ShardError as error:
        raise ShardError(f"{error}; name another column with --label-column, or '' for no labels") from error


def _parse_label(value: Any, name: str) -> int | str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (int, float, Decimal)):
        raise ShardError(f"{name} contains {type(value).__name__}, not numbers or names")
    # pandas writes missing numbers as NaN
    return None if math.isnan(value) else check_label(value, name)


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
    return _read_file(location, lambda: file.read_row_group(group, columns=[column])[column])


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


def _read_file(location: str, read: Callable[[], Result]) -> Result:
    """Return ``read()``, retried for a file in a store; errors name the file."""

    def attempt() -> Result:
        try:
            return read()
        except _pyarrow().ArrowInvalid as error:
            raise _DamagedFile(f"{location} cannot be read ({_one_line(error)}); upload it again") from error

    try:
        if not is_url(location):
            return read()
        folder, _, name = location.rpartition("/")
        return Store(folder, BULK_POLICY).retry(name, attempt)
    except ShardError as error:
        if isinstance(error, _DamagedFile) or not is_url(location):
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
