"""Each image of a tar gets the label of its own name, and whatever is passed over is counted."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import lzma
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from drawn_images import add_to_tar, drawn_image, encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.format.tally import Tally
from shards.format.tar_members import IMAGE_EXTENSIONS, Sample, read_members, read_samples, split_name
from shards.packing.inputs import list_inputs

_GNU_TAR = shutil.which("tar")
_NAMES = st.builds(
    lambda stem, suffix: f"{stem}.{suffix}",
    st.text("ab.", min_size=1, max_size=5).filter(lambda stem: stem[0] != "."),
    st.sampled_from(["jpg", "png", "cls", "txt", "JPG"]),
)


def _tar(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            add_to_tar(tar, name, content)
    return buffer.getvalue()


def _samples(content: bytes, tally: Tally | None = None) -> tuple[Sample, ...]:
    return read_samples(io.BytesIO(content), "x.tar", tally)


def _labels(*names: str) -> tuple[dict[str, int], Tally]:
    """Return the label of each image of a tar whose labels are numbered in order, and the counts."""
    tally = Tally()
    numbers = itertools.count()
    members = [(name, str(next(numbers)).encode() if name.endswith(".cls") else b"x") for name in names]
    return {sample.image.name: sample.label for sample in _samples(_tar(members), tally)}, tally


@settings(max_examples=300, deadline=None)
@given(names=st.lists(_NAMES, max_size=12), data=st.data())
def test_an_image_gets_its_own_label_or_the_tar_is_refused(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    values = [data.draw(st.integers(0, 1)) for _ in names]
    members = [(name, str(value).encode()) for name, value in zip(names, values, strict=True)]
    path = tmp_path_factory.getbasetemp() / "x.tar"
    path.write_bytes(_tar(members))
    stated: dict[str, set[int]] = {}
    for name, value in zip(names, values, strict=True):
        if name.endswith(".cls"):
            stated.setdefault(name.removesuffix(".cls"), set()).add(value)
    images = [name for name in names if name[-3:].lower() in ("jpg", "png")]
    is_ambiguous = any(len(label) > 1 for label in stated.values())
    try:
        samples = _samples(path.read_bytes())
        listed = [(item.name, item.label) for item in list_inputs(str(path)).items]
    except ShardError as error:
        assert (is_ambiguous and "occurs more than once" in str(error)) or (not images and "no images" in str(error))
        return
    assert not is_ambiguous
    assert [name for name, _ in listed] == images
    for name, label in [*listed, *((sample.image.name, sample.label) for sample in samples)]:
        stem, key = name[:-4], split_name(name)[0]
        others = {image[:-4] for image in images if split_name(image)[0] == key} - {stem}
        if stem in stated:
            assert {label} == stated[stem]
        elif label != -1:  # by WebDataset's rule, which must leave no doubt
            assert {label} == stated[key] and all(other in stated and other != key for other in others)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([f"{key}.{suffix}" for key in "abc" for suffix in ("jpg", "png", "cls", "txt")])))
def test_names_with_one_dot_form_the_samples_of_webdataset(names: list[str]) -> None:
    expected = []
    for key, run in itertools.groupby(names, key=lambda name: name[0]):
        extensions = [name[2:] for name in run]
        if any(extension in IMAGE_EXTENSIONS for extension in extensions):
            expected.append((key, extensions))
    samples = _samples(_tar([(name, b"7") for name in names]))
    assert [(sample.key, [part.extension for part in sample.components]) for sample in samples] == expected
    for sample in samples:
        assert sample.image == next(part for part in sample.components if part.extension in IMAGE_EXTENSIONS)


def test_labels_of_dotted_names() -> None:
    labels, _ = _labels("IMG.1.jpg", "IMG.1.cls", "IMG.2.jpg", "IMG.2.cls", "IMG.3.jpg")
    assert labels == {"IMG.1.jpg": 0, "IMG.2.jpg": 1, "IMG.3.jpg": -1}
    labels, _ = _labels("s0.input.jpg", "s0.cls", "s0.outputs.txt", "s1.input.jpg", "s1.cls")
    assert labels == {"s0.input.jpg": 0, "s1.input.jpg": 1}
    labels, _ = _labels("a.jpg", "b.jpg", "b.cls", "a.cls", "./c.jpg", "c.cls")  # need not be neighbours
    assert labels == {"a.jpg": 1, "b.jpg": 0, "./c.jpg": 2}


@pytest.mark.parametrize(
    ("names", "labels", "line"),
    [
        (["f.left.png", "f.right.png", "f.cls"], [-1, -1], "labels that several images could claim, passed over: 1"),
        (["a.jpg", "a.x.cls"], [-1], "labels without an image of their name, passed over: 1"),
        (["a.jpg", "a.cls", "b.jpg"], [0, -1], "images without a label of their name: 1"),
        (["a.jpg", "a.png", "a.mask.png", "a.seg.png"], [-1], "second images of a sample, passed over: 2"),
        (["a.jpg", "b.jpg", "a.jpg"], [-1, -1], "images with the name of another image, taken as well: 1"),
        (["a.jpg", "._a.jpg", ".b/.c"], [-1], "hidden files, such as ._NAME of macOS, passed over: 2"),
        (["a.jpg", "a.gif", "b.gif", "c.txt", "d"], [-1], ".gif 2, .txt 1, no suffix 1"),
    ],
)
def test_what_is_passed_over_is_counted(names: list[str], labels: list[int], line: str) -> None:
    found, tally = _labels(*names)
    assert set(found.values()) == set(labels)
    assert any(line in each for each in tally.lines())


def test_links_special_files_and_texts_as_labels_are_counted() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        texts = (b"cat", b" " * 1023 + b"12", b"1_0")
        for number, text in enumerate(texts):
            add_to_tar(tar, f"{number}.jpg", b"x")
            add_to_tar(tar, f"{number}.cls", text)
        add_to_tar(tar, "a.jpg", b"x")
        for name, kind in [("c.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.SYMTYPE), ("e.jpg", tarfile.FIFOTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    tally = Tally()
    assert [sample.label for sample in _samples(buffer.getvalue(), tally)] == [-1] * 4
    assert tally.lines() == [
        "hard or symbolic links, passed over: 2",
        "images without a label of their name: 1",
        "labels that are not integers, passed over: 3",
        "special files, passed over: 1",
    ]


def test_appended_tars_are_read_and_each_has_its_own_names() -> None:
    first, second = ([("a.jpg", b"x"), ("a.cls", label)] for label in (b"1", b"2"))
    content = _tar(first) + _tar(second, tarfile.GNU_FORMAT) + bytes(10240)
    samples = _samples(content)
    assert [(sample.image.name, sample.label) for sample in samples] == [("a.jpg", 1), ("a.jpg", 2)]
    assert all(content[sample.image.offset] == ord("x") for sample in samples)
    with pytest.raises(ShardError, match=r"x\.tar has data after its end mark, at byte 10240, that are not a tar"):
        _samples(_tar(first) + b"signature")
    with pytest.raises(ShardError, match=r"x\.tar: 'a\.cls' occurs more than once, as the label 1 and as 2"):
        _samples(_tar([*first, *second]))


@pytest.mark.skipif(_GNU_TAR is None, reason="needs GNU tar")
@pytest.mark.parametrize("form", ["gnu", "posix 0.0", "posix 0.1", "posix 1.0"])
def test_sparse_members_are_named_as_such(tmp_path: Path, form: str) -> None:
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
    (tmp_path / "hole.dat").write_bytes(b"")
    with open(tmp_path / "hole.dat", "r+b") as file:
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "a.jpg").write_bytes(encoded(drawn_image(1)))
    kind, _, version = form.partition(" ")
    options = [f"--format={kind}", *([f"--sparse-version={version}"] if version else [])]

    def pack(*names: str) -> bytes:
        command = ["tar", "-c", "--sparse", "--hole-detection=raw", *options, "-f", "x.tar", *names]
        if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
            pytest.skip("needs GNU tar")
        return (tmp_path / "x.tar").read_bytes()

    with pytest.raises(ShardError, match=r"member 'hole\.jpg' is sparse .* without --sparse"):
        _samples(pack("hole.jpg", "a.jpg"))
    tally = Tally()
    assert [sample.key for sample in _samples(pack("hole.dat", "a.jpg"), tally)] == ["a"]
    assert tally.lines() == ["sparse members, passed over: 1"]


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz"])
def test_compressed_tar_is_named(kind: str) -> None:
    compress = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}[kind]
    with pytest.raises(ShardError, match=rf"x\.tar is not a plain tar: it is compressed \({kind}\); decompress it"):
        _samples(compress(_tar([("a.jpg", b"x")])))
    assert [sample.key for sample in _samples(_tar([("BZh.jpg", b"x")]))] == ["BZh"]  # a name is no compression


@pytest.mark.parametrize(
    "fields",
    [b"1" * 1_000_000, b"2 " * 500_000 + b"=", b"9" * 300 + b" hdrcharset=x\n", b"12 a=1234567\n" * 80_000],
    ids=["digits", "no equals sign", "long number", "many fields"],
)
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_any_header_is_parsed_in_linear_time(fields: bytes, kind: bytes) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, len(fields)
    content = header.tobuf(tarfile.USTAR_FORMAT) + fields + bytes(-len(fields) % 512) + _tar([("a.jpg", b"x")])
    began = time.monotonic()
    try:
        list(read_members(io.BytesIO(content), "x.tar", Tally()))
    except ShardError as error:
        assert "x.tar is" in str(error)
    assert time.monotonic() - began < 3.0


def test_long_names_of_every_letter_are_read() -> None:
    # the byte that is a header's kind may have any value in a block that continues a name
    for form, letter in itertools.product((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT), "xgXLK="):
        name = f"{letter * 400}.jpg"
        assert [sample.key for sample in _samples(_tar([(name, b"x")], form))] == [letter * 400]
