"""What to pack: the images of a folder, of a list file or of a tar, each with its label.

A folder or a tar gives labels by class folders: once the folders that all images share are taken off, the first that
remains is an image's class, and class names in sorted order get the labels 0, 1, 2 … A tar in WebDataset form gives its
own labels in ``.cls``. A list file holds a path a line, relative to itself, with a tab and a label if it has labels.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from shards.errors import ShardError
from shards.index import LABEL_EXTENSION, NO_LABEL, parse_label, read_members, split_name

# What is tried; a file of another kind is passed over without a word, one of these that fails is reported.
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".tga", ".jp2"]
)
_DECOMPRESSORS = {".gz": gzip, ".tgz": gzip, ".xz": lzma, ".txz": lzma, ".bz2": bz2, ".tbz2": bz2}
_KEY_LENGTH = 60
_LARGEST_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Item:
    """One image to pack: a whole file, or a range of a tar."""

    name: str  # relative to the source, with slashes
    label: int
    path: Path
    offset: int = 0
    length: int | None = None  # bytes; None is the whole file

    def read(self) -> bytes:
        """The image's bytes.

        Raises:
            ShardError: it cannot be read, with the reason.
        """
        try:
            # opening a pipe would wait for somebody to write into it
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise ShardError("not a regular file")
            with open(self.path, "rb") as file:
                length = os.fstat(file.fileno()).st_size if self.length is None else self.length
                if length > _LARGEST_FILE_BYTES:
                    raise ShardError(f"the file has {length} bytes, more than {_LARGEST_FILE_BYTES}")
                file.seek(self.offset)
                return file.read(length)
        except OSError as error:
            raise ShardError(error.strerror or str(error)) from error


@dataclass(frozen=True)
class Inputs:
    """Everything to pack, in order.

    Attributes:
        classes: class names by label; empty where labels have no names or there are none.
        num_ignored: files beside the images.
    """

    items: tuple[Item, ...]
    classes: tuple[str, ...]
    num_ignored: int

    def fingerprint(self, options: str) -> str:
        """32 hex digits that tell this packing from another: what is packed and how."""
        digest = hashlib.sha256(options.encode())
        for item in self.items:
            digest.update(f"\n{item.name}\t{item.label}\t{item.offset}\t{item.length}".encode(errors="surrogateescape"))
        return digest.hexdigest()[:32]


def is_compressed_tar(src: Path) -> bool:
    """Whether a file is a tar that must be unpacked before members can be read at random."""
    return src.suffix.lower() in _DECOMPRESSORS and (".tar" in src.suffixes or src.suffix.lower().startswith(".t"))


def decompress(src: Path, target: Path) -> None:
    """Write the plain tar of a compressed one.

    Raises:
        ShardError: it is damaged.
    """
    try:
        with _DECOMPRESSORS[src.suffix.lower()].open(src) as packed, open(target, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ShardError(f"{src} is damaged ({error}); fetch it again") from error


def list_inputs(src: Path) -> Inputs:
    """The images of a folder, a list file or an uncompressed tar, in an order that depends on their names only.

    Raises:
        ShardError: no such source, or no images in it.
    """
    if src.is_dir():
        inputs = _list_folder(src)
    elif not src.exists():
        raise ShardError(f"--src {src} does not exist; give a folder of images, a list file or a tar")
    elif not src.is_file():
        raise ShardError(f"--src {src} is neither a folder nor a regular file; give a folder, a list file or a tar")
    elif src.suffix.lower() == ".tar":
        inputs = _list_tar(src)
    else:
        inputs = _list_file(src)
    if not inputs.items:
        raise ShardError(f"no images in {src}; files ending in .jpg, .png, .webp, .tif, .gif or .bmp are looked for")
    return inputs


def sample_key(number: int, name: str) -> str:
    """The WebDataset key of an image: its number in the source, so that it is unique, and the tail of its path."""
    stem = str(PurePosixPath(name).with_suffix(""))
    return f"{number:09d}_{re.sub('[^A-Za-z0-9_-]+', '_', stem)[-_KEY_LENGTH:].strip('_')}".rstrip("_")


def _is_image_name(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _list_folder(src: Path) -> Inputs:
    names: list[str] = []
    ignored = 0
    for folder, files in _walk(src):
        for file in files:
            name = (folder.relative_to(src) / file).as_posix()
            if _is_image_name(name):
                names.append(name)
            else:
                ignored += 1
    names.sort()
    return _with_class_folders([Item(name, NO_LABEL, src / name) for name in names], ignored)


def _walk(src: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and their files, through symbolic links, each folder once."""
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


def _list_tar(src: Path) -> Inputs:
    items: list[Item] = []
    labels: dict[str, int] = {}
    others = 0
    with open(src, "rb") as archive:
        for member in read_members(archive, str(src)):
            name = member.name.removeprefix("./").lstrip("/")
            if _is_image_name(name):
                items.append(Item(name, NO_LABEL, src, member.offset_data, member.size))
            elif name.endswith("." + LABEL_EXTENSION):
                position = archive.tell()
                archive.seek(member.offset_data)
                labels[split_name(name)[0]] = parse_label(archive.read(member.size))
                archive.seek(position)
            else:
                others += 1
    if labels:
        labelled = [replace(item, label=labels.get(split_name(item.name)[0], NO_LABEL)) for item in items]
        return Inputs(tuple(labelled), (), others)
    return _with_class_folders(items, others)


def _list_file(src: Path) -> Inputs:
    try:
        lines = src.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ShardError(f"--src {src} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ShardError(f"--src {src} is neither a folder, a tar nor a text file with a path a line") from error
    entries = [line.partition("\t")[::2] for line in lines if line.strip()]
    names = [path.strip() for path, _ in entries]
    stated = [label.strip() for _, label in entries]
    named = [label for label in stated if label]
    if all(label.isascii() and label.isdigit() for label in named):
        classes: tuple[str, ...] = ()
        labels = [int(label) if label else NO_LABEL for label in stated]
    else:
        classes = tuple(sorted(set(named)))
        number = {name: label for label, name in enumerate(classes)}
        labels = [number.get(label, NO_LABEL) for label in stated]
    items = [Item(name, label, src.parent / name) for name, label in zip(names, labels, strict=True)]
    return Inputs(tuple(items), classes, 0)


def _with_class_folders(items: Sequence[Item], num_ignored: int) -> Inputs:
    """Labels from the first folder in which the images differ."""
    folders = [PurePosixPath(item.name).parent.parts for item in items]
    shared = 0
    while folders and all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    owners = [parts[shared] if len(parts) > shared else "" for parts in folders]
    classes = tuple(sorted(set(owners) - {""}))
    number = {name: label for label, name in enumerate(classes)}
    labelled = [replace(item, label=number.get(owner, NO_LABEL)) for item, owner in zip(items, owners, strict=True)]
    return Inputs(tuple(labelled), classes, num_ignored)
