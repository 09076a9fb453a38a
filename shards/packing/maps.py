"""Maps of class ids or depth that are packed with the images, byte for byte.

They are members of the archive of the images, or files of the same names in parallel folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import ShardError, SourceUnreachable, explain_os_error, printable
from shards.format.label_maps import MAP_KINDS, MapKind
from shards.format.set_manifest import counted
from shards.format.tally import is_hidden
from shards.format.tar_members import MAP_EXTENSIONS, Member, find_maps, split_map, split_suffix
from shards.packing.items import FileSpan, Inputs, Item, ItemMap, Location
from shards.packing.summary import LEFT_OUT

if TYPE_CHECKING:
    from shards.packing.options import PackOptions

# maps of each kind that are tried before packing
_NUM_TRIED = 4


@dataclass(frozen=True)
class PreparedMap:
    """A map that can be used.

    Attributes:
        kind: of ``MAP_KINDS``.
        extension: of the member that is packed, such as ``seg.png``.
    """

    kind: str
    extension: str
    payload: bytes


def take_maps(
    members: Sequence[Member], suffixes: frozenset[str], locate: Callable[[Member], Location]
) -> tuple[list[Member], dict[tuple[int, str], tuple[ItemMap, ...]]]:
    """Split the members of an archive into other members, and maps by archive and stem of their image.

    Args:
        suffixes: of images, with their dots.
    """
    found = find_maps(members, {suffix[1:] for suffix in suffixes})
    members_of: dict[tuple[int, str], dict[str, Member]] = {}
    for member, stem in found.items():
        parts = split_map(member.name)
        assert parts is not None
        members_of.setdefault((member.archive, stem), {}).setdefault(parts[1], member)
    maps = {
        stem: tuple(
            ItemMap(kind, extension, locate(by_extension[extension]))
            for kind, extensions in MAP_EXTENSIONS.items()
            for extension in [each for each in extensions if each in by_extension][:1]
        )
        for stem, by_extension in members_of.items()
    }
    return [member for member in members if member not in found], maps


def maps_of(image: Member, maps: Mapping[tuple[int, str], tuple[ItemMap, ...]]) -> tuple[ItemMap, ...]:
    """Return the maps of an image, as ``take_maps`` returned them."""
    return maps.get((image.archive, split_suffix(image.name)[0]), ())


def pair_folders(inputs: Inputs, src: str, folders: Mapping[str, Path]) -> Inputs:
    """Return inputs whose images have the maps in parallel folders: ``masks/A/B.png`` for ``src/A/B.jpg``.

    Args:
        folders: by the kind of map.

    Raises:
        ShardError: ``src`` is no local folder, a folder is missing or inside it, or no image has a map of a kind.
    """
    for kind, folder in folders.items():
        option = f"--{kind} {folder}"
        if not Path(src).is_dir():
            raise ShardError(f"{option} needs a local folder of images as --src, not {printable(src)}")
        if not folder.is_dir():
            raise ShardError(f"{option} is not a folder; give the folder of the {MAP_KINDS[kind].title}s")
        if folder.resolve().is_relative_to(Path(src).resolve()):
            raise ShardError(f"{option} is inside --src, so its files would be packed as images; move it")
        paths, num_unused = find_map_files([item.name for item in inputs.items], folder, MAP_KINDS[kind])
        num_missing = paths.count(None)
        if num_missing == len(paths):
            reason = f"no image of {src} has a file in {option}: {inputs.items[0].name} needs "
            raise ShardError(printable(reason + describe_map_files(inputs.items[0].name, folder, MAP_KINDS[kind])))
        title = MAP_KINDS[kind].title
        inputs.passed_over.add(f"images without a {title} in {folder}", num_missing)
        inputs.passed_over.add(f"{title}s without an image in {src}, passed over", num_unused)
        items = list(inputs.items)
        for number, path in enumerate(paths):
            if path is not None:
                found = ItemMap(kind, kind + path.suffix.lower(), FileSpan(path))
                items[number] = replace(items[number], maps=(*items[number].maps, found))
        inputs = replace(inputs, items=tuple(items))
    return inputs


def find_map_files(names: Sequence[str], folder: Path, kind: MapKind) -> tuple[list[Path | None], int]:
    """Find the maps of images in a parallel folder; the case of their suffixes does not matter.

    Args:
        names: of the images, relative to their folder.

    Returns:
        The map of each image, None if it has none, and the number of maps in the same subfolders that no image has.

    Raises:
        ShardError: a folder cannot be read.
    """
    listed = {parent: _list_maps(folder / parent, kind) for parent in {Path(name).parent for name in names}}
    paths = []
    for name in map(Path, names):
        options = (listed[name.parent].get(name.stem + suffix) for suffix in kind.suffixes)
        paths.append(next((path for path in options if path is not None), None))
    stems = {path.with_suffix("") for path in paths if path is not None}
    unused = {path.with_suffix("") for found in listed.values() for path in found.values()} - stems
    return paths, len(unused)


def _list_maps(folder: Path, kind: MapKind) -> dict[str, Path]:
    """Return the maps in a folder by name, with the suffix in lower case; empty if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            files = [folder / entry.name for entry in entries if entry.is_file() and not is_hidden(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ShardError(f"cannot list {printable(folder)}: {explain_os_error(error)}") from error
    # of names that differ in case only, the one in lower case comes last
    return {path.stem + path.suffix.lower(): path for path in sorted(files) if path.suffix.lower() in kind.suffixes}


def describe_map_files(name: str, folder: Path, kind: MapKind) -> str:
    """Return the paths that the map of an image can have in a parallel folder, as text."""
    return " or ".join(str(folder / Path(name).with_suffix(suffix)) for suffix in kind.suffixes)


def check_maps(inputs: Inputs, options: PackOptions) -> None:
    """Raise a ShardError if none of the first maps of a kind in ``--seg`` or ``--depth`` can be decoded."""
    for kind in options.map_folders:
        tried = [each for item in inputs.items for each in item.maps if each.kind == kind][:_NUM_TRIED]
        reasons = []
        for each in tried:
            try:
                MAP_KINDS[kind].decode(each.location.read())
            except SourceUnreachable:
                raise
            except ShardError as error:
                reasons.append(f"{getattr(each.location, 'path', each.extension)}: {error}")
        if len(reasons) == len(tried):
            first = printable(reasons[0])
            title = MAP_KINDS[kind].title
            raise ShardError(
                f"none of the {counted(len(tried), title)} tried in --{kind} can be used; the first: {first}"
            )


def prepare_maps(item: Item, width: int, height: int) -> tuple[tuple[PreparedMap, ...], tuple[str, ...]]:
    """Read and decode the maps of an image; return the usable maps, and the reasons why others are not.

    Args:
        width, height: of the image, upright.

    Raises:
        SourceUnreachable: the source cannot be read.
    """
    usable, left_out = [], []
    for each in item.maps:
        kind = MAP_KINDS[each.kind]
        try:
            payload = each.location.read()
            kind.decode_for(payload, width, height)
        except SourceUnreachable:
            raise
        except ShardError as error:
            left_out.append(f"{LEFT_OUT} its {kind.title}: {error}")
        else:
            usable.append(PreparedMap(each.kind, each.extension, payload))
    return tuple(usable), tuple(left_out)
