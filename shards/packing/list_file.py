"""List files: text files with one path or URL per line, and optional labels."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from shards.credentials import strip_credentials
from shards.errors import ShardError
from shards.format.tar_members import NO_LABEL, check_label
from shards.packing.items import MAX_ITEMS, FileSpan, Inputs, Item, RemoteObject, number_classes
from shards.storage.paths import expand_path
from shards.storage.store import is_url

_LIST_FORM = "a list is a text file with one path per line"
_NUMBER = re.compile(r"[+-]?[0-9]{1,1000}(\.[0-9]{0,1000})?")
_MAX_LINE = 1 << 16  # characters


def list_file(src: Path) -> Inputs:
    names: list[str] = []
    stated: list[str] = []
    try:
        with open(src, encoding="utf-8-sig") as file:  # some editors write a byte order mark
            for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), ""), start=1):
                if "\0" in line:
                    raise ShardError(f"--src {src}: NUL byte in line {number}; {_LIST_FORM}")
                if len(line) == _MAX_LINE:
                    raise ShardError(f"--src {src}: line {number} is longer than {_MAX_LINE} characters; {_LIST_FORM}")
                if not line.strip():
                    continue
                if len(names) == MAX_ITEMS:
                    raise ShardError(f"--src {src} lists more than {MAX_ITEMS} images; make several sets of it")
                path, _, text = line.partition("\t")
                names.append(path.strip())
                stated.append(text.strip())
    except UnicodeDecodeError as error:
        raise ShardError(
            f"--src {src} is neither a folder, a tar nor a text file with one path per line; unpack other archives"
        ) from error
    if not names:
        raise ShardError(f"--src {src} lists no images; {_LIST_FORM}")
    classes, labels = _parse_labels(stated, names, src)
    items = []
    for name, label in zip(names, labels, strict=True):
        folder, _, file_name = name.rpartition("/")
        location = RemoteObject(folder, file_name) if is_url(name) else FileSpan(_listed_path(src, name))
        items.append(Item(strip_credentials(name), label, location))
    return Inputs(tuple(items), classes)


def _listed_path(src: Path, name: str) -> Path:
    """Return the path of an image in a list, relative to the list; ``~`` is the home folder unless a file has it."""
    path = src.parent / name
    return Path(expand_path(name)) if name.startswith("~") and not os.path.lexists(path) else path


def _parse_labels(stated: Sequence[str], names: Sequence[str], src: Path) -> tuple[tuple[str, ...], list[int]]:
    """Return the classes and labels of a list with numbers or names as labels; errors name the list and the image."""
    numbers = [_NUMBER.fullmatch(label) is not None for label in stated]
    if not any(numbers):
        return number_classes(stated)
    labels = []
    for label, is_number, name in zip(stated, numbers, names, strict=True):
        if label and not is_number:
            raise ShardError(
                f"{src}: {name}: the label {label!r} is a name, but {stated[numbers.index(True)]!r} is a number; "
                "give every image a number, or every image a name"
            )
        value = float(label) if "." in label else int(label or NO_LABEL)
        labels.append(check_label(value, f"{src}: {name}"))
    return (), labels
