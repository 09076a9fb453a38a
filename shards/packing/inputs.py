"""Listing the images to pack, with labels: from a folder, a list, an archive or Parquet files, local or in a store.

In a folder, tar or zip, labels come from class folders: the first folder level at which the images differ is an image's
class, and the sorted class names get the labels 0, 1, 2, ... An archive with ``.cls`` members has its labels in these.
A list file has one path or URL per line, relative to the file, optionally followed by a tab and a label. Parquet files
have a label column. The label -1 means no label.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from PIL import features

from shards.errors import ShardError, explain_os_error
from shards.format import dicom
from shards.format.files import partial_path
from shards.format.pixels import RGB, PixelFormat
from shards.format.set_manifest import counted
from shards.format.tally import Tally, is_hidden
from shards.format.tar_members import (
    ARRAY_EXTENSION,
    LABEL_EXTENSION,
    MAX_LABEL_BYTES,
    NO_LABEL,
    Member,
    pair_labels,
    parse_label,
    read_label,
    read_members,
    split_suffix,
)
from shards.packing.items import (
    ZIP_ERRORS,
    FileSpan,
    Inputs,
    Item,
    Location,
    RemoteObject,
    ZipMember,
    label_by_folder,
    open_zip,
)
from shards.packing.list_file import list_file
from shards.packing.maps import maps_of, take_maps
from shards.packing.parquet import SUFFIX as PARQUET_SUFFIX
from shards.packing.parquet import Columns, list_parquet
from shards.storage.store import BULK_POLICY, Store, is_url

# Files with other suffixes are passed over and counted; a file with one of these that fails to decode is rejected.
_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .tif .tiff .gif .bmp .pbm .pgm .ppm .pnm .tga .jp2 .j2k .j2c .jpx .jpf"
)
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split()) | ({".avif"} if features.check("avif") else set())
_ARRAY_SUFFIXES = IMAGE_SUFFIXES | {f".{ARRAY_EXTENSION}", dicom.SUFFIX}
_DECOMPRESSORS = {".gz": gzip, ".tgz": gzip, ".xz": lzma, ".txz": lzma, ".bz2": bz2, ".tbz2": bz2}
_TAR_SUFFIX = ".tar"
_ZIP_SUFFIX = ".zip"
_SOURCES = "a folder of images, a list file, a tar, a zip, a parquet or a URL"
_PIECE_BYTES = 1 << 20
# an archive of images hardly gets smaller by compression; one that unpacks to more than this is refused
_MAX_EXPANSION = 100
_FREE_EXPANSION = 1 << 30  # bytes


def needs_unpacking(src: str) -> bool:
    """Return whether a source is a tar that needs an uncompressed local copy for random access."""
    return is_compressed_tar(src) or (is_url(src) and src.endswith(_TAR_SUFFIX))


def unpack(src: str, target: Path, pixels: PixelFormat = RGB) -> None:
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
    _require_images(_list_tar(target, src, _suffixes_of(pixels)), src)


def _decompress(src: str, path: Path, target: Path) -> None:
    try:
        packed = _DECOMPRESSORS[_suffix(src)].open(path)
    except OSError as error:
        raise ShardError(f"--src {src} cannot be read ({error.strerror})") from error
    try:
        limit = _FREE_EXPANSION + _MAX_EXPANSION * path.stat().st_size
        with packed, open(target, "wb") as plain:
            while piece := packed.read(_PIECE_BYTES):
                if plain.tell() + len(piece) > limit:
                    raise ShardError(f"{src} unpacks to more than {limit} bytes; unpack it first, and give the folder")
                plain.write(piece)
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        # gzip and bz2 raise an OSError without errno for bad data
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ShardError(f"{src} cannot be decompressed ({error}); fetch it again, or fix its suffix") from error


def list_inputs(src: str, columns: Columns | None = None, pixels: PixelFormat = RGB) -> Inputs:
    """List the images of a path or URL that needs no unpacking, in an order that depends only on their names.

    Arrays (``.npy``) are images unless ``pixels`` is 8-bit RGB.

    Raises:
        ShardError: the source does not exist, cannot be read, or has no images.
    """
    if not src.strip():
        raise ShardError(f"--src is empty; give {_SOURCES}")
    try:
        return _require_images(_list_source(src, columns or Columns(), _suffixes_of(pixels)), src)
    except OSError as error:
        raise ShardError(f"--src {src} cannot be read ({explain_os_error(error)})") from error


def _suffixes_of(pixels: PixelFormat) -> frozenset[str]:
    return IMAGE_SUFFIXES if pixels.is_rgb else _ARRAY_SUFFIXES


def _list_source(src: str, columns: Columns, suffixes: frozenset[str]) -> Inputs:
    if is_url(src):
        _refuse_by_name(src)
        return _list_remote(src, columns, suffixes)
    path = Path(src)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(f"--src {src} does not exist; give {_SOURCES}") from None
    if stat.S_ISDIR(mode):
        return _list_folder(path, columns, suffixes)
    if not stat.S_ISREG(mode):
        raise ShardError(f"--src {src} is neither a folder nor a regular file; give a folder, a list file or a tar")
    if path.suffix.lower() == _TAR_SUFFIX:
        return _list_tar(path, src, suffixes)
    if path.suffix.lower() == _ZIP_SUFFIX:
        return _list_zip(path, src, suffixes)
    if path.suffix.lower() == PARQUET_SUFFIX:
        return list_parquet([src], [path.name], columns, Tally())
    _refuse_by_name(src)
    return list_file(path)


def is_compressed_tar(src: str) -> bool:
    """Return whether a path or URL has the name of a compressed tar that can be unpacked."""
    return _suffix(src) in _DECOMPRESSORS and (_TAR_SUFFIX in PurePosixPath(src).suffixes or _suffix(src)[1] == "t")


def refuse_zstd(src: str) -> None:
    """Raise a ShardError if a path or URL has the name of a tar compressed with zstd."""
    if _suffix(src) == ".tzst" or (_suffix(src) == ".zst" and _TAR_SUFFIX in PurePosixPath(src).suffixes):
        raise ShardError(f"--src {src}: zstd is not supported; decompress it first (zstd -d) and give the .tar")


def _refuse_by_name(src: str) -> None:
    refuse_zstd(src)
    if is_url(src) and _suffix(src) == _ZIP_SUFFIX:
        raise ShardError(f"--src {src}: a zip is read from a local disk only; copy it there first")
    if _is_image_name(src) and not src.endswith("/"):
        folder = src.rpartition("/")[0] or "."
        raise ShardError(f"--src {src} is a single image; give its folder, {folder}")


def _require_images(inputs: Inputs, src: str) -> Inputs:
    if not inputs.items:
        supported = "supported are .jpg, .png, .webp, .tif, .gif, .bmp and .parquet files"
        raise ShardError(f"no images in {src}; {supported}{inputs.passed_over.clauses()}")
    return inputs


def _suffix(src: str) -> str:
    return PurePosixPath(src).suffix.lower()


def _is_image_name(name: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> bool:
    return _suffix(name) in suffixes and not is_hidden(name)


def list_images(src: Path, pixels: PixelFormat = RGB) -> Inputs:
    """List the images of a local folder, labelled by class folder; there may be none.

    Raises:
        ShardError: a folder cannot be read.
    """
    passed_over = Tally()
    return _label_files(src, _list_names(src, passed_over), passed_over, _suffixes_of(pixels))


def _label_files(src: Path, names: Sequence[str], passed_over: Tally, suffixes: frozenset[str]) -> Inputs:
    images = _pick_images(names, passed_over, suffixes)
    return label_by_folder([Item(name, NO_LABEL, FileSpan(src / name)) for name in images], passed_over)


def _pick_images(names: Iterable[str], passed_over: Tally, suffixes: frozenset[str]) -> list[str]:
    """Return the names of images; count all others."""
    images = []
    for name in names:
        if _is_image_name(name, suffixes):
            images.append(name)
        else:
            passed_over.add_file(name)
    return images


def _list_folder(src: Path, columns: Columns, suffixes: frozenset[str]) -> Inputs:
    passed_over = Tally()
    names = _list_names(src, passed_over)
    if any(_is_image_name(name, suffixes) for name in names):
        return _label_files(src, names, passed_over, suffixes)
    tables = [name for name in names if name.lower().endswith(PARQUET_SUFFIX)]
    tars = [name for name in names if name.lower().endswith(_TAR_SUFFIX)]
    for name in names:
        if name not in tables:
            passed_over.add_file(name)
    advice = (
        f"to use its {counted(len(tars), '.tar file')}, run: streamtrain index --src {src} --out SET" if tars else ""
    )
    if not tables:
        if tars:
            raise ShardError(f"no images in {src}; {advice}")
        return Inputs((), (), passed_over)
    try:
        return list_parquet([str(src / name) for name in tables], tables, columns, passed_over)
    except ShardError as error:
        if tars:
            raise ShardError(f"{error}; {advice}") from error
        raise


def _list_names(src: Path, passed_over: Tally) -> list[str]:
    """Return the sorted names of the files in a folder at any depth, relative and with slashes."""
    return sorted(
        (folder.relative_to(src) / file).as_posix() for folder, files in _walk(src, passed_over) for file in files
    )


def _list_remote(src: str, columns: Columns, suffixes: frozenset[str]) -> Inputs:
    folder = src.rstrip("/")
    passed_over = Tally()
    if folder.lower().endswith(PARQUET_SUFFIX):
        return list_parquet([folder], [folder.rpartition("/")[2]], columns, passed_over)
    tree = Store(folder, BULK_POLICY).list_tree()
    visible = [name for name in tree if not is_hidden(name)]
    passed_over.add("files in hidden folders, or hidden files, passed over", len(tree) - len(visible))
    tables = [name for name in visible if name.lower().endswith(PARQUET_SUFFIX)]
    if tables and not any(_is_image_name(name, suffixes) for name in visible):
        for name in visible:
            if not name.lower().endswith(PARQUET_SUFFIX):
                passed_over.add_file(name)
        return list_parquet([f"{folder}/{name}" for name in tables], tables, columns, passed_over)
    plain = unquote if folder.startswith("http") else str  # links on web pages are percent-encoded
    images = _pick_images(visible, passed_over, suffixes)
    items = [Item(plain(name), NO_LABEL, RemoteObject(folder, name, tree[name])) for name in images]
    return label_by_folder(items, passed_over)


def _walk(src: Path, passed_over: Tally) -> Iterator[tuple[Path, list[str]]]:
    """Yield folders and their files, following symbolic links, each folder once; hidden folders are counted."""
    seen = set()
    for folder, folders, files in os.walk(src, followlinks=True, onerror=_raise_unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            passed_over.add("folders that were reached before by another link, passed over")
            continue
        seen.add((status.st_dev, status.st_ino))
        visible = sorted(name for name in folders if not name.startswith("."))
        passed_over.add("hidden folders, passed over", len(folders) - len(visible))
        folders[:] = visible
        yield Path(folder), files


def _raise_unreadable(error: OSError) -> None:
    raise ShardError(f"{error.filename} cannot be read ({explain_os_error(error)})") from error


def _list_tar(path: Path, src: str, suffixes: frozenset[str]) -> Inputs:
    """List the images of an uncompressed tar at ``path``; errors name it ``src``."""
    passed_over = Tally()
    with open(path, "rb") as archive:
        members = read_members(archive, src, passed_over)
        return _list_archive(
            members,
            lambda member: FileSpan(path, member.offset, member.length),
            lambda label: read_label(archive, label, src),
            src,
            passed_over,
            suffixes,
        )


def _list_zip(path: Path, src: str, suffixes: frozenset[str]) -> Inputs:
    """List the images of a zip archive; its members are read in place."""
    passed_over = Tally()
    try:
        open_zip.cache_clear()  # the file may have changed since an earlier call
        archive = open_zip(path)
        return _list_archive(
            _zip_members(archive, passed_over),
            lambda member: ZipMember(path, member.offset, member.length),
            lambda label: parse_label(_read_zip_label(path, label), f"{src}: {label.name}"),
            src,
            passed_over,
            suffixes,
        )
    except ShardError:
        raise
    except ZIP_ERRORS as error:
        raise ShardError(f"--src {src} is not a zip archive that can be read ({error}); fetch it again") from error


def _zip_members(archive: zipfile.ZipFile, passed_over: Tally) -> Iterator[Member]:
    """Yield the regular files of a zip archive; the number of a member takes the place of its offset."""
    for number, entry in enumerate(archive.infolist()):
        if stat.S_ISLNK(entry.external_attr >> 16):
            passed_over.add("hard or symbolic links, passed over")
        elif entry.flag_bits & 1:
            passed_over.add("encrypted files, passed over")
        elif not entry.is_dir() and not entry.filename.endswith("\\"):
            # some programs on Windows write backslashes
            name = entry.filename if "/" in entry.filename else entry.filename.replace("\\", "/")
            yield Member(name, number, entry.file_size)


def _read_zip_label(path: Path, label: Member) -> bytes:
    return b"" if label.length > MAX_LABEL_BYTES else ZipMember(path, label.offset, label.length).read()


def _list_archive(
    members: Iterable[Member],
    locate: Callable[[Member], Location],
    read: Callable[[Member], int | None],
    src: str,
    passed_over: Tally,
    suffixes: frozenset[str],
) -> Inputs:
    """List the images among the members of an archive, with labels from its ``.cls`` members or its folders."""
    images: list[Member] = []
    labels: list[Member] = []
    rest, maps = take_maps(list(members), suffixes, locate)
    for member in rest:
        if _is_image_name(member.name, suffixes):
            images.append(member)
        elif split_suffix(member.name)[1] == LABEL_EXTENSION and not is_hidden(member.name):
            labels.append(member)
        else:
            passed_over.add_file(member.name)
    values = pair_labels(images, labels, read, src, passed_over)
    names = [image.name.removeprefix("./").lstrip("/") for image in images]
    items = [
        Item(name, label, locate(image), maps=maps_of(image, maps))
        for name, label, image in zip(names, values, images, strict=True)
    ]
    return Inputs(tuple(items), (), passed_over) if labels else label_by_folder(items, passed_over)
