"""Listing the images to pack, with labels: from a folder, a list file, a tar or Parquet files, local or in a store.

In a folder or tar, labels come from class folders: the first folder level at which the images differ is an image's
class, and the sorted class names get the labels 0, 1, 2, ... A WebDataset tar has its labels in ``.cls`` members. A
list file has one path or URL per line, relative to the file, optionally followed by a tab and a label. Parquet files
have a label column. The label -1 means no label.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from shards.credentials import strip_credentials
from shards.errors import ShardError
from shards.format.files import partial_path
from shards.format.index import LABEL_EXTENSION, NO_LABEL, check_label, read_label, read_members, split_name
from shards.packing.items import FileSpan, Inputs, Item, RemoteObject, label_by_folder, number_classes
from shards.packing.parquet import SUFFIX as PARQUET_SUFFIX
from shards.packing.parquet import Columns, list_parquet
from shards.storage.store import BULK_POLICY, Store, is_url

# Files with other suffixes are ignored silently; a file with one of these that fails to decode is reported.
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".tga", ".jp2"]
)
_DECOMPRESSORS = {".gz": gzip, ".tgz": gzip, ".xz": lzma, ".txz": lzma, ".bz2": bz2, ".tbz2": bz2}
_TAR_SUFFIX = ".tar"
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


def needs_unpacking(src: str) -> bool:
    """Return whether a source is a tar that needs an uncompressed local copy for random access."""
    return is_compressed_tar(src) or (is_url(src) and src.endswith(_TAR_SUFFIX))


def unpack(src: str, target: Path) -> None:
    """Write the uncompressed local copy of a tar that is compressed, in a store, or both.

    Raises:
        ShardError: the tar cannot be fetched, is damaged, or has no images; names the source, not the copy.
    """
    path = Path(src)
    if is_url(src):
        folder, _, name = src.rpartition("/")
        path = partial_path(target) if is_compressed_tar(src) else target
        Store(folder, BULK_POLICY).copy(name, path)
    if is_compressed_tar(src):
        try:
            _decompress(src, path, target)
        finally:
            if is_url(src):
                path.unlink(missing_ok=True)
    _require_images(_list_tar(target, src), src)


def _decompress(src: str, path: Path, target: Path) -> None:
    try:
        packed = _DECOMPRESSORS[_suffix(src)].open(path)
    except OSError as error:
        raise ShardError(f"--src {src} cannot be read ({error.strerror})") from error
    try:
        with packed, open(target, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        # gzip and bz2 raise an OSError without errno for bad data
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ShardError(f"{src} cannot be decompressed ({error}); fetch it again, or fix its suffix") from error


def list_inputs(src: str, columns: Columns | None = None) -> Inputs:
    """List the images of a path or URL that needs no unpacking, in an order that depends only on their names.

    Raises:
        ShardError: the source does not exist or has no images.
    """
    columns = columns or Columns()
    path = Path(src)
    if not src.strip():
        raise ShardError("--src is empty; give a folder of images, a list file, a tar, a parquet or a URL")
    if is_url(src):
        _refuse_by_name(src)
        inputs = _list_remote(src, columns)
    elif path.is_dir():
        inputs = _list_folder(path, columns)
    elif not path.exists():
        raise ShardError(f"--src {src} does not exist; give a folder of images, a list file, a tar, a parquet or a URL")
    elif not path.is_file():
        raise ShardError(f"--src {src} is neither a folder nor a regular file; give a folder, a list file or a tar")
    elif path.suffix.lower() == _TAR_SUFFIX:
        inputs = _list_tar(path, src)
    elif path.suffix.lower() == PARQUET_SUFFIX:
        inputs = list_parquet([src], [path.name], columns, 0)
    else:
        _refuse_by_name(src)
        inputs = _list_file(path)
    return _require_images(inputs, src)


def is_compressed_tar(src: str) -> bool:
    """Return whether a path or URL has the name of a compressed tar that can be unpacked."""
    return _suffix(src) in _DECOMPRESSORS and (_TAR_SUFFIX in PurePosixPath(src).suffixes or _suffix(src)[1] == "t")


def refuse_zstd(src: str) -> None:
    """Raise a ShardError if a path or URL has the name of a tar compressed with zstd."""
    if _suffix(src) == ".tzst" or (_suffix(src) == ".zst" and _TAR_SUFFIX in PurePosixPath(src).suffixes):
        raise ShardError(f"--src {src}: zstd is not supported; decompress it first (zstd -d) and give the .tar")


def _refuse_by_name(src: str) -> None:
    refuse_zstd(src)
    if _is_image_name(src) and not src.endswith("/"):
        folder = src.rpartition("/")[0] or "."
        raise ShardError(f"--src {src} is a single image; give its folder, {folder}")


def _require_images(inputs: Inputs, src: str) -> Inputs:
    if not inputs.items:
        raise ShardError(f"no images in {src}; supported are .jpg, .png, .webp, .tif, .gif, .bmp and .parquet files")
    return inputs


def _suffix(src: str) -> str:
    return PurePosixPath(src).suffix.lower()


def _is_image_name(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _list_folder(src: Path, columns: Columns) -> Inputs:
    names = sorted((folder.relative_to(src) / file).as_posix() for folder, files in _walk(src) for file in files)
    images = [name for name in names if _is_image_name(name)]
    tables = [name for name in names if name.lower().endswith(PARQUET_SUFFIX)]
    if tables and not images:
        return list_parquet([str(src / name) for name in tables], tables, columns, len(names) - len(tables))
    items = [Item(name, NO_LABEL, FileSpan(src / name)) for name in images]
    return label_by_folder(items, len(names) - len(images))


def _list_remote(src: str, columns: Columns) -> Inputs:
    folder = src.rstrip("/")
    if folder.lower().endswith(PARQUET_SUFFIX):
        return list_parquet([folder], [folder.rpartition("/")[2]], columns, 0)
    tree = Store(folder, BULK_POLICY).list_tree()
    images = [name for name in tree if _is_image_name(name) and not _is_hidden(name)]
    tables = [name for name in tree if name.lower().endswith(PARQUET_SUFFIX) and not _is_hidden(name)]
    if tables and not images:
        return list_parquet([f"{folder}/{name}" for name in tables], tables, columns, len(tree) - len(tables))
    plain = unquote if folder.startswith("http") else str  # links on web pages are percent-encoded
    items = [Item(plain(name), NO_LABEL, RemoteObject(folder, name, tree[name])) for name in images]
    return label_by_folder(items, len(tree) - len(images))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _walk(src: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders and their files, following symbolic links, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(src, followlinks=True, onerror=_raise_unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), files


def _raise_unreadable(error: OSError) -> None:
    raise ShardError(f"{error.filename} cannot be read ({error.strerror})") from error


def _list_tar(path: Path, src: str) -> Inputs:
    """List the images of an uncompressed tar at ``path``; errors name it ``src``."""
    items: list[Item] = []
    labels: dict[str, int] = {}
    others = 0
    with open(path, "rb") as archive:
        for member in read_members(archive, src):
            name = member.name.removeprefix("./").lstrip("/")
            if _is_image_name(name):
                items.append(Item(name, NO_LABEL, FileSpan(path, member.offset_data, member.size)))
            elif name.endswith("." + LABEL_EXTENSION):
                position = archive.tell()
                labels[split_name(name)[0]] = read_label(archive, member.offset_data, member.size, f"{src}: {name}")
                archive.seek(position)
            else:
                others += 1
    if labels:
        labelled = [replace(item, label=labels.get(split_name(item.name)[0], NO_LABEL)) for item in items]
        return Inputs(tuple(labelled), (), others)
    return label_by_folder(items, others)


def _list_file(src: Path) -> Inputs:
    try:
        lines = src.read_text(encoding="utf-8-sig").splitlines()  # some editors write a byte order mark
    except OSError as error:
        raise ShardError(f"--src {src} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ShardError(
            f"--src {src} is neither a folder, a tar nor a text file with one path per line; unpack other archives"
        ) from error
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise ShardError(f"--src {src}: NUL byte in line {number}; a list is a text file with one path per line")
    entries = [line.partition("\t")[::2] for line in lines if line.strip()]
    if not entries:
        raise ShardError(f"--src {src} lists no images; a list is a text file with one path per line")
    names = [path.strip() for path, _ in entries]
    classes, labels = _parse_labels([label.strip() for _, label in entries], [f"{src}: {name}" for name in names])
    items = []
    for name, label in zip(names, labels, strict=True):
        folder, _, file = name.rpartition("/")
        location = RemoteObject(folder, file) if is_url(name) else FileSpan(src.parent / name)
        items.append(Item(strip_credentials(name), label, location))
    return Inputs(tuple(items), classes, 0)


def _parse_labels(stated: Sequence[str], entries: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Return the classes and labels of a list with numbers or names as labels; errors name the entry."""
    numbers = [_NUMBER.fullmatch(label) is not None for label in stated]
    if not any(numbers):
        return number_classes(stated)
    labels = []
    for label, is_number, entry in zip(stated, numbers, entries, strict=True):
        if label and not is_number:
            raise ShardError(
                f"{entry}: the label {label!r} is a name, but {stated[numbers.index(True)]!r} is a number; "
                "give every image a number, or every image a name"
            )
        labels.append(check_label(float(label) if "." in label else int(label), entry) if label else NO_LABEL)
    return (), labels
