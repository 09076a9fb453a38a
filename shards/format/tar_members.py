"""Members of a WebDataset tar, the samples that they form, and the label of each image.

An image and its label belong together if their names differ in the last suffix only: ``IMG.0001.jpg`` and
``IMG.0001.cls``. WebDataset's rule, which ends a key at the first dot, applies where that leaves no doubt:
``s0000.input.jpg`` gets the label of ``s0000.cls`` if no other image can claim it.

``X.seg.png``, ``X.depth.png`` and ``X.depth.npy`` are maps of the image ``X.jpg``: class ids or depth of its pixels.
Without an image of that name they are files like any other.
"""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import BinaryIO

from shards.errors import ShardError
from shards.format.pixels import RGB, PixelFormat
from shards.format.tally import Tally, is_hidden

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff")
ARRAY_EXTENSION = "npy"  # of images in sets of other pixels than 8-bit RGB
LABEL_EXTENSION = "cls"
# kinds of maps, and the extensions of each, the first one preferred
MAP_EXTENSIONS = {"seg": ("seg.png",), "depth": ("depth.npy", "depth.png")}
NO_LABEL = -1
MAX_LABEL_BYTES = 1 << 10
_MAX_HEADER_BYTES = 1 << 20  # of a tar member, with its long name and attributes
_MAX_GLOBAL_FIELDS = 1000  # of PAX
_MAX_DIGITS = 255  # in a row, in a PAX header
_PAX_KINDS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NAME_KINDS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_KIND_OFFSET = 156  # bytes, of the kind of a member in its header
_DIGITS = re.compile(rb"\d+")
_INTEGER = re.compile(rb"\s*[+-]?[0-9]{1,1000}\s*")
_PIECE_BYTES = 1 << 20
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in an archive."""

    name: str
    offset: int  # bytes from the start of the tar to the member's content
    length: int  # bytes
    archive: int = 0  # number of the archive, where several tars were concatenated


@dataclass(frozen=True, slots=True)
class Component:
    """One member of a sample in a tar."""

    extension: str
    offset: int  # bytes from the start of the tar to the member's content
    length: int  # bytes
    name: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a tar, with its components in the tar's order."""

    key: str
    components: tuple[Component, ...]
    image: Component
    label: int = NO_LABEL

    def map_of(self, kind: str) -> Component | None:
        """Return the map of a kind of ``MAP_EXTENSIONS``."""
        named = ((split_map(component.name), component) for component in reversed(self.components))
        by_extension = {parts[1]: component for parts, component in named if parts and parts[0] == self.key}
        return next((by_extension[name] for name in MAP_EXTENSIONS[kind] if name in by_extension), None)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension at the first dot after the last slash, as WebDataset and DALI do."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    return (name, "") if dot < 0 else (name[:dot], name[dot + 1 :])


def split_suffix(name: str) -> tuple[str, str]:
    """Split a name into stem and lower-case suffix at the last dot after the last slash, if that is not the first."""
    slash = name.rfind("/") + 1
    dot = name.rfind(".", slash)
    return (name, "") if dot <= slash else (name[:dot], name[dot + 1 :].lower())


def split_map(name: str) -> tuple[str, str] | None:
    """Return the stem and the extension of a name that a map of an image has, such as ``seg.png``, otherwise None."""
    stem, suffix = split_suffix(name)
    stem, kind = split_suffix(stem)
    extension = f"{kind}.{suffix}"
    return (stem, extension) if any(extension in known for known in MAP_EXTENSIONS.values()) else None


def find_maps(members: Iterable[Member], suffixes: Container[str]) -> dict[Member, str]:
    """Return the members that are maps, and the stem of the image that each belongs to.

    Args:
        suffixes: of images, in lower case.
    """
    candidates: dict[Member, str] = {}
    stems: set[tuple[int, str]] = set()
    for member in members:
        if (parts := split_map(member.name)) is not None:
            candidates[member] = parts[0]
        elif (parts := split_suffix(member.name))[1] in suffixes:
            stems.add((member.archive, parts[0]))
    return {member: stem for member, stem in candidates.items() if (member.archive, stem) in stems}


def read_samples(
    archive: BinaryIO, name: str, tally: Tally | None = None, pixels: PixelFormat = RGB
) -> tuple[Sample, ...]:
    """Return the samples of an uncompressed tar (USTAR, GNU or PAX) that have an image, in order.

    A sample is a run of members with the same key by WebDataset's rule. Its image is the first member named by the key
    and an image suffix. If all images of a run have longer names, such as ``IMG.0001.jpg``, each one is a sample.

    Args:
        tally: receives the counts of members that are passed over.
        pixels: of the set; other than 8-bit RGB, arrays (``.npy``) are images too.

    Raises:
        ShardError: not a tar, or truncated, or a label is invalid or ambiguous; names the tar and the member.
    """
    tally = Tally() if tally is None else tally
    extensions = IMAGE_EXTENSIONS if pixels.is_rgb else (*IMAGE_EXTENSIONS, ARRAY_EXTENSION)
    samples: list[tuple[str, tuple[Component, ...], Component]] = []
    images: list[Member] = []
    labels: list[Member] = []
    for _, run in itertools.groupby(
        _visible(read_members(archive, name, tally), tally), key=lambda member: (member.archive, _key_of(member.name))
    ):
        members = list(run)
        labels += (member for member in members if split_suffix(member.name)[1] == LABEL_EXTENSION)
        for image, parts in _split_run(members, tally, extensions):
            stem = split_suffix(image.name)[0]
            components = tuple(_component(member, stem) for member in parts)
            samples.append((stem, components, components[parts.index(image)]))
            images.append(image)
    values = pair_labels(images, labels, lambda label: read_label(archive, label, name), name, tally)
    return tuple(Sample(*sample, value) for sample, value in zip(samples, values, strict=True))


def pair_labels(
    images: Sequence[Member], labels: Sequence[Member], read: Callable[[Member], int | None], source: str, tally: Tally
) -> list[int]:
    """Return the label of each image, ``NO_LABEL`` for none.

    Args:
        read: returns the value of a label, or None if it is not an integer.
        source: name of the archive, for messages.
        tally: receives the numbers of labels and images without a counterpart.

    Raises:
        ShardError: two labels of one name differ, or as ``read``; names the archive and the label.
    """
    values: dict[tuple[int, str], int] = {}
    for label in labels:
        value = read(label)
        if value is None:
            tally.add("labels that are not integers, passed over")
            value = NO_LABEL
        stem = _stem(label)
        if values.setdefault(stem, value) != value:
            raise ShardError(
                f"{source}: {label.name!r} occurs more than once, as the label {values[stem]} and as {value}; "
                "remove one of them"
            )
    stems = [_stem(image) for image in images]
    tally.add("images with the name of another image, taken as well", len(images) - len({i.name for i in images}))
    if not values:
        return [NO_LABEL] * len(images)
    own = set(stems)
    claims: dict[tuple[int, str], set[tuple[int, str]]] = defaultdict(set)
    for stem in own - values.keys():
        key = (stem[0], split_name(stem[1])[0])
        if key in values and key not in own:
            claims[key].add(stem)
    given = {claimants.pop(): values[key] for key, claimants in claims.items() if len(claimants) == 1}
    several = sum(1 for claimants in claims.values() if claimants)
    tally.add("labels that several images could claim, passed over", several)
    tally.add("labels without an image of their name, passed over", len(values.keys() - own) - len(claims))
    num_without = sum(stem not in values and stem not in given for stem in stems)
    tally.add("images without a label of their name", num_without)
    return [values.get(stem, given.get(stem, NO_LABEL)) for stem in stems]


def read_members(archive: BinaryIO, name: str, tally: Tally) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar, and those of tars that were appended to it.

    Raises:
        ShardError: not a tar, truncated, or with other data after its end mark; names the tar.
    """
    size = archive.seek(0, io.SEEK_END)
    begin, number = 0, 0
    while begin < size or number == 0:
        end = yield from _read_archive(archive, name, tally, begin, size, number)
        begin, number = _skip_zeros(archive, end, size), number + 1


def parse_label(text: bytes, name: str) -> int | None:
    """Return the integer in a ``.cls`` component, or None if it holds other text; raises as ``check_label``."""
    # int() also takes underscores, other digits and spaces
    return check_label(int(text), name) if _INTEGER.fullmatch(text) else None


def check_label(label: float | Decimal, name: str) -> int:
    """Return a label as the integer that the index stores; floats must be whole numbers.

    Raises:
        ShardError: the label is out of range or fractional; names it and ``name``, where it was found.
    """
    if not (NO_LABEL <= label < 2**31 and label == int(label)):
        raise ShardError(f"{name}: the label {label} is not a whole number from 0 to {2**31 - 1}, or -1 for no label")
    return int(label)


def read_label(archive: BinaryIO, label: Member, source: str) -> int | None:
    """Return the integer in a ``.cls`` member, or None if it holds other text; raises as ``check_label``."""
    if label.length > MAX_LABEL_BYTES:
        return None
    archive.seek(label.offset)
    return parse_label(archive.read(label.length), f"{source}: {label.name}")


def _stem(member: Member) -> tuple[int, str]:
    """Return the archive and the stem of a member, which an image shares with its label."""
    return member.archive, split_suffix(member.name)[0].removeprefix("./").lstrip("/")


def _key_of(name: str) -> str:
    return split_name(name)[0]


def _visible(members: Iterable[Member], tally: Tally) -> Iterator[Member]:
    """Yield the members that can belong to a sample."""
    for member in members:
        if is_hidden(member.name) or not split_name(member.name)[1]:
            tally.add_file(member.name)
        else:
            yield member


def _split_run(members: list[Member], tally: Tally, extensions: Sequence[str]) -> Iterator[tuple[Member, list[Member]]]:
    """Yield the image of each sample of a run, and the sample's members; count what belongs to no sample."""
    images = []
    maps = find_maps(members, extensions)
    for member in members:
        suffix = split_suffix(member.name)[1]
        if member in maps:
            continue
        if suffix in extensions:
            images.append(member)
        elif suffix != LABEL_EXTENSION:
            tally.add_file(member.name)
    stems = {split_suffix(image.name)[0]: image for image in reversed(images)}  # the first image of each stem
    key = _key_of(members[0].name)
    if key in stems or len(stems) == 1:
        yield stems.get(key, images[0]), members
        num_taken = 1
    else:
        parts = defaultdict(list)
        for member in members:
            parts[maps.get(member, split_suffix(member.name)[0])].append(member)
        yield from ((stems[stem], parts[stem]) for stem in dict.fromkeys(split_suffix(i.name)[0] for i in images))
        num_taken = len(stems)
    if images:
        tally.add("second images of a sample, passed over", len(images) - num_taken)


def _component(member: Member, stem: str) -> Component:
    found = split_map(member.name)
    is_own = split_suffix(member.name)[0] == stem or (found is not None and found[0] == stem)
    extension = member.name[len(stem) + 1 :] if is_own else split_name(member.name)[1]
    return Component(extension, member.offset, member.length, member.name)


def _read_archive(
    archive: BinaryIO, name: str, tally: Tally, begin: int, size: int, number: int
) -> Generator[Member, None, int]:
    """Yield the regular files of the tar that begins at a byte of a file of ``size`` bytes; return where it ends."""
    archive.seek(begin)
    headers = _HeaderReader(archive, name)
    end = begin
    try:
        tar = tarfile.open(fileobj=headers, mode="r:", encoding="utf-8")  # type: ignore[call-overload]  # noqa: SIM115
        while (member := tar.next()) is not None:
            # a header can hold a negative size, which would lead back to an earlier member
            if member.size < 0 or tar.offset <= end:
                raise ShardError(f"{name} is damaged at byte {end}: a member of {member.size} bytes; fetch it again")
            # tarfile copies the global fields of PAX for every member
            if len(tar.pax_headers) > _MAX_GLOBAL_FIELDS:
                raise ShardError(f"{name} is damaged at byte {end}: too many global fields; fetch it again")
            if member.issparse():
                if split_suffix(member.name)[1] in (*IMAGE_EXTENSIONS, LABEL_EXTENSION):
                    raise ShardError(
                        f"{name}: member {member.name!r} is sparse (it has holes); pack it again without --sparse"
                    )
                tally.add("sparse members, passed over")
            elif member.offset_data + member.size > size:
                raise ShardError(f"{name} is truncated at member {member.name!r}; fetch or pack it again")
            elif member.isreg():
                yield Member(member.name, member.offset_data, member.size, number)
            elif member.islnk() or member.issym():
                tally.add("hard or symbolic links, passed over")
            elif not member.isdir():
                tally.add("special files, passed over")
            end = tar.offset
            tar.members.clear()  # tarfile keeps every member
            headers.reset()
        # tarfile stops without an error at a damaged header; a complete tar ends with zeros or at the end of the file
        archive.seek(tar.offset)
        if any(archive.read(tarfile.BLOCKSIZE)):
            if begin and end == begin:
                raise ShardError(
                    f"{name} has data after its end mark, at byte {begin}, that are not a tar; fetch it again"
                )
            raise ShardError(f"{name} is damaged at byte {tar.offset}: expected a header; fetch or pack it again")
        return int(tar.offset)
    except ShardError:
        raise
    # tarfile converts header fields to numbers, lengths and text with few checks
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        archive.seek(0)
        start = archive.read(8)
        kind = next((kind for magic, kind in _COMPRESSIONS.items() if start.startswith(magic)), None)
        if kind is not None and end == 0:
            raise ShardError(f"{name} is not a plain tar: it is compressed ({kind}); decompress it first") from error
        raise ShardError(f"{name} is not a complete tar file ({error}); fetch or pack it again") from error


def _skip_zeros(archive: BinaryIO, begin: int, size: int) -> int:
    """Return the first block after the zeros that end a tar; ``size`` if there is none."""
    archive.seek(begin)
    while piece := archive.read(_PIECE_BYTES):
        if rest := piece.lstrip(b"\0"):
            return begin + (len(piece) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        begin += len(piece)
    return size


class _HeaderReader:
    """File interface for ``tarfile`` that reads headers only, and refuses any that would take long to parse."""

    def __init__(self, archive: BinaryIO, name: str) -> None:
        self._archive, self._name = archive, name
        self.seek, self.tell = archive.seek, archive.tell
        self._kind = b""  # of the header whose content is read next
        self.reset()

    def reset(self) -> None:
        """Start the byte budget of the next member."""
        self._left = _MAX_HEADER_BYTES

    def read(self, length: int) -> bytes:
        if not 0 <= length <= self._left:
            raise ShardError(f"{self._name} is damaged near byte {self.tell()}: its header is too long; fetch it again")
        self._left -= length
        content = self._archive.read(length)
        if self._kind in _PAX_KINDS and not _is_linear(content):
            raise ShardError(f"{self._name} is damaged near byte {self.tell()}: an invalid header; fetch it again")
        kind = content[_KIND_OFFSET : _KIND_OFFSET + 1]
        self._kind = kind if not self._kind and kind in (*_PAX_KINDS, *_LONG_NAME_KINDS) else b""
        return content


def _is_linear(fields: bytes) -> bool:
    """Return whether tarfile parses the fields of a PAX header in linear time.

    It looks for the "=" of each field beyond the field's end, and searches for fields by their digits.
    """
    if max(map(len, _DIGITS.findall(fields)), default=0) > _MAX_DIGITS:
        return False
    position = 0
    while (digits := _DIGITS.match(fields, position)) is not None:
        length = int(digits[0])
        if fields.find(b"=", digits.end(), position + length) < 0:
            return not length  # a field of no bytes ends the parsing with an error
        position += length
    return True
