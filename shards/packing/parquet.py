"""Images in a column of parquet files, as the data sets of Hugging Face have them; pyarrow reads them.

The image column holds the encoded bytes, or structs of ``bytes`` and ``path``. Labels are whole numbers, whose names
Hugging Face's metadata may tell, or names; -1, null and NaN are none.
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
from shards.format.index import NO_LABEL, checked_label
from shards.format.items import Inputs, Item, SourceUnreachable, with_class_names
from shards.format.tars import is_url
from shards.storage.remote_folder import RemoteFolder

SUFFIX = ".parquet"
_LABEL_COLUMN = "label"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Columns:
    """Which columns to take; None: the only one that holds images, and ``label`` if there is one."""

    image: str | None = None
    label: str | None = None  # empty: labels are not wanted


@dataclass(frozen=True)
class ParquetCell:
    """One row's image."""

    location: str  # of the file: a path or a URL
    column: str
    group: int  # row group
    row: int  # in the group

    @property
    def mark(self) -> str:
        """As ``Place.mark``."""
        return f"{self.column}\t{self.group}\t{self.row}"

    def read(self) -> bytes:
        """As ``Place.read``; neighbouring rows are read together."""
        cell = _column(self.location, self.column, self.group)[self.row].as_py()
        if isinstance(cell, dict):
            cell, path = cell["bytes"], cell.get("path")
            if cell is None and path:
                raise ShardError(f"the cell has no bytes, only the path {path}; embed the files in the data set")
        if cell is None:
            raise ShardError("the cell is empty")
        return bytes(cell)


def list_parquet(locations: Sequence[str], names: Sequence[str], columns: Columns, num_ignored: int) -> Inputs:
    """The images of parquet files.

    Args:
        locations: paths or URLs.
        names: of the same files, for keys and messages.
        columns: which to take.
        num_ignored: files beside them.

    Raises:
        ShardError: pyarrow is missing, a file is damaged, has no such column, or labels that are none.
    """
    items: list[Item] = []
    runs: list[int] = []
    labels: list[Any] = []
    stated: tuple[str, ...] = ()
    for location, name in zip(locations, names, strict=True):
        file = _file(location)
        column = columns.image or _only_image_column(file, location)
        _check_image_column(file, column, location)
        label = _LABEL_COLUMN if columns.label is None and _LABEL_COLUMN in file.schema_arrow.names else columns.label
        if label and label not in file.schema_arrow.names:
            raise ShardError(f"{location} has no column {label!r}; it has {', '.join(file.schema_arrow.names)}")
        stated = stated or _class_names(file, label)
        labels += _labels(location, label) if label else [None] * file.metadata.num_rows
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        runs += sizes
        cells = (ParquetCell(location, column, group, row) for group, size in enumerate(sizes) for row in range(size))
        items += (Item(f"{name}/{number}", NO_LABEL, cell) for number, cell in enumerate(cells))
    numbers, classes = _numbers(labels, stated)
    labelled = (Item(item.name, label, item.place) for item, label in zip(items, numbers, strict=True))
    return Inputs(tuple(labelled), classes, num_ignored, tuple(run for run in runs if run))


def _labels(location: str, column: str) -> list[int | str | None]:
    """All of a column, as numbers or names."""
    file = _file(location)
    values = _damage_named(location, lambda: list(file.read([column])[column].to_pylist()))
    try:
        return [_label(value, f"{location}: column {column!r}") for value in values]
    except ShardError as error:
        raise ShardError(f"{error}; name another column with --label-column, or '' to go without") from error


def _label(value: Any, place: str) -> int | str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (int, float, Decimal)):
        raise ShardError(f"{place} holds {type(value).__name__}, not numbers or names")
    # NaN is how pandas writes that a number is missing
    return None if math.isnan(value) else checked_label(value, place)


def _numbers(
    labels: Sequence[int | str | None], stated_classes: tuple[str, ...]
) -> tuple[list[int], tuple[str, ...]]:
    """Labels as numbers, and the names of their classes."""
    names = [label for label in labels if isinstance(label, str)]
    numbers = [NO_LABEL if label is None else label for label in labels if not isinstance(label, str)]
    if not names:
        return numbers, stated_classes
    if any(label != NO_LABEL for label in numbers):
        raise ShardError("some of the parquet files have labels by number, others by name; pack them one by one")
    classes, numbers = with_class_names([label if isinstance(label, str) else None for label in labels])
    return numbers, classes


def _only_image_column(file: Any, location: str) -> str:
    candidates = [name for name in file.schema_arrow.names if _holds_images(file, name)]
    if len(candidates) != 1:
        found = f"several columns of bytes ({', '.join(candidates)})" if candidates else "no column of bytes"
        raise ShardError(f"{location} has {found}; name the images' column with --image-column")
    return str(candidates[0])


def _check_image_column(file: Any, column: str, location: str) -> None:
    if column not in file.schema_arrow.names:
        raise ShardError(f"{location} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
    if not _holds_images(file, column):
        raise ShardError(
            f"{location}: column {column!r} holds {file.schema_arrow.field(column).type}, not bytes or structs of "
            "bytes and path; name another with --image-column"
        )


def _holds_images(file: Any, column: str) -> bool:
    types = _pyarrow().types
    kind = file.schema_arrow.field(column).type
    if types.is_struct(kind):
        fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        kind = fields.get("bytes")
    return kind is not None and (types.is_binary(kind) or types.is_large_binary(kind))


def _class_names(file: Any, label: str | None) -> tuple[str, ...]:
    """What Hugging Face's metadata says of the label column."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, ValueError, TypeError):
        return ()


@lru_cache(maxsize=2)
def _column(location: str, column: str, group: int) -> Any:
    """The image column of a row group, kept for its next rows."""
    file = _file(location)
    return _damage_named(location, lambda: file.read_row_group(group, columns=[column])[column])


@lru_cache(maxsize=4)
def _file(location: str) -> Any:
    parquet = _pyarrow().parquet
    if is_url(location):
        folder, _, name = location.rpartition("/")
        source: Any = RemoteFolder(folder).open(name)
    else:
        source = location
    return _damage_named(location, lambda: parquet.ParquetFile(source))


def _damage_named(location: str, read: Callable[[], Result]) -> Result:
    """What ``read`` gives; of a file in a store it is asked for again until the store answers."""
    try:
        if not is_url(location):
            return read()
        folder, _, name = location.rpartition("/")
        outcome = RemoteFolder(folder).persist(name, lambda: _told_apart(read, location))
        if isinstance(outcome, _OnlyWhole):
            raise outcome
        return outcome
    except ShardError as error:
        if isinstance(error, (_Damaged, _OnlyWhole)) or not is_url(location):
            raise
        raise SourceUnreachable(f"{error}; once it can be read, run this again to go on") from error
    except (ValueError, OSError) as error:  # pyarrow's errors are among these
        raise ShardError(f"{location} cannot be read ({' '.join(str(error).split())}); fetch it again") from error


class _Damaged(ShardError):
    """The file came whole, and is no good."""


class _OnlyWhole(ShardError):
    """The server gives files from their beginning only; it will not learn that by being asked again."""


def _told_apart(read: Callable[[], Result], location: str) -> Result | _OnlyWhole:
    """What ``read`` gives; what is not to be tried again is returned, not raised."""
    try:
        return read()
    except _pyarrow().ArrowInvalid as error:
        raise _Damaged(f"{location} cannot be read ({' '.join(str(error).split())}); upload it again") from error
    except ValueError as error:
        # fsspec's word for an answer that is whole where a range was asked for, or for a file without a length;
        # trouble on the way is of other kinds
        if not location.startswith("http"):
            raise
        return _OnlyWhole(
            f"{location} cannot be read in parts ({' '.join(str(error).split())}); copy it here, and give the copy"
        )


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ShardError(f"parquet files need pyarrow: pip install pyarrow ({error})") from error
    return pyarrow
