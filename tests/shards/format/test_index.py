"""WebDataset tars of any writer can be indexed."""

from __future__ import annotations

import io
import tarfile
import zlib

import pytest
from drawn_images import add_to_tar, drawn_image, encoded

from shards.errors import ShardError
from shards.format.index import (
    build_index,
    make_dali_index,
    make_record,
)
from shards.format.records import UNREADABLE
from shards.format.tar_members import NO_LABEL, parse_label, split_name

_LONG = "folder/" + "n" * 200


def _tar(members: list[tuple[str, bytes]], form: int) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            if name.endswith("/"):
                folder = tarfile.TarInfo(name)
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
                continue
            add_to_tar(tar, name, content)
    return buffer


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_with_long_and_utf8_names_and_several_components(form: int) -> None:
    pictures = [
        encoded(drawn_image(number, 20 + number, 10), kind) for number, kind in enumerate(["JPEG", "PNG", "WEBP"])
    ]
    archive = _tar(
        [
            ("folder/", b""),
            (f"{_LONG}.json", b"{}"),
            (f"{_LONG}.JPEG", pictures[0]),
            (f"{_LONG}.cls", b"7\n"),
            ("folder/no_image.txt", b"words"),
            ("größe.seg.png", b"a mask, not the image"),
            ("größe.png", pictures[1]),
            ("folder/._hidden.jpg", b"resource fork"),
            ("folder/.jpg", b"no key"),
            ("last.webp", pictures[2]),
        ],
        form,
    )
    index = build_index(archive, "foreign.tar")
    assert [sample.key for sample in index.samples] == [_LONG, "größe", "last"]
    assert index.records["label"].tolist() == [7, NO_LABEL, NO_LABEL]
    assert index.records["width"].tolist() == [20, 21, 22]
    content = archive.getvalue()
    for record, picture in zip(index.records, pictures, strict=True):
        assert content[record["offset"] : record["offset"] + record["length"]] == picture
        assert record["crc32"] == zlib.crc32(picture)


def test_names_are_split_like_webdataset() -> None:
    assert split_name("a.b/c.d.jpg") == ("a.b/c", "d.jpg")
    assert split_name("a.b/c") == ("a.b/c", "")


def test_labels_that_are_not_integers_are_ignored() -> None:
    texts = (b"3", b" 12\n", b"cat", b"-1", b"", b"\xff")
    assert [parse_label(text, "x.tar: a.cls") for text in texts] == [3, 12, None, -1, None, None]


@pytest.mark.parametrize("label", [-4, 2**31, 99999999999])
def test_out_of_range_label_is_named_with_its_member(label: int) -> None:
    archive = _tar([("a.jpg", encoded(drawn_image(0))), ("a.cls", str(label).encode())], tarfile.USTAR_FORMAT)
    with pytest.raises(ShardError, match=rf"^x\.tar: a\.cls: the label {label} is not a whole number from 0"):
        build_index(archive, "x.tar")


@pytest.mark.parametrize("keep", [100, 700, 1500])
def test_truncated_tar_is_named(keep: int) -> None:
    content = _tar([("a.jpg", bytes(600)), ("b.jpg", bytes(600))], tarfile.USTAR_FORMAT).getvalue()
    with pytest.raises(ShardError, match=r"mine\.tar"):
        build_index(io.BytesIO(content[:keep]), "mine.tar")


def test_damaged_header_is_not_taken_for_the_end() -> None:
    members = [(f"{number}.jpg", encoded(drawn_image(number))) for number in range(4)]
    content = bytearray(_tar(members, tarfile.USTAR_FORMAT).getvalue())
    second = content.index(b"1.jpg")
    content[second + 3] ^= 1
    with pytest.raises(ShardError, match=f"set.tar is damaged at byte {second}"):
        build_index(io.BytesIO(content), "set.tar")
    # a tar without the two final blocks of zeros is complete
    bare = bytes(_tar(members, tarfile.USTAR_FORMAT).getvalue()).rstrip(b"\0")
    bare += b"\0" * (-len(bare) % tarfile.BLOCKSIZE)
    assert len(build_index(io.BytesIO(bare), "set.tar").samples) == 4


def test_record_has_the_size_after_exif_rotation() -> None:
    exif = drawn_image(1).getexif()
    exif[0x0112] = 6
    record = make_record(512, encoded(drawn_image(1, 40, 30), exif=exif), NO_LABEL)
    assert (record["width"], record["height"]) == (30, 40)


def test_unreadable_image_is_flagged() -> None:
    record = make_record(512, b"not an image", 3)
    assert (record["width"], record["height"], record["flags"]) == (0, 0, UNREADABLE)


def test_dali_index_refuses_names_with_spaces() -> None:
    archive = _tar([("a b.jpg", encoded(drawn_image(0)))], tarfile.USTAR_FORMAT)
    with pytest.raises(ShardError, match="a b"):
        make_dali_index(build_index(archive, "x.tar").samples)
