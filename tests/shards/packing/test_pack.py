"""The same source gives the same set, with any number of workers and interruptions."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import socket
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from drawn_images import add_to_tar, all_labels, all_payloads, draw_folder, drawn_image, encoded, file_contents

from shards.errors import ShardError
from shards.packing.items import sample_key
from shards.packing.pack import PackOptions, PackReport, pack
from shards.packing.summary import describe_rejected
from shards.packing.verify import verify
from shards.reading.shard_set import ShardSet

_SMALL = PackOptions(shard_bytes=20_000)


def _rejected(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


def test_number_of_workers_does_not_change_the_set(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 50, ("b", "a"))
    (images / "a" / "broken.jpg").write_bytes(b"text")
    reports = [pack(images, tmp_path / f"set{workers}", _SMALL, workers=workers) for workers in (1, 2)]
    assert file_contents(tmp_path / "set1") == file_contents(tmp_path / "set2")
    assert reports[0].manifest.digest == reports[1].manifest.digest
    assert verify(tmp_path / "set1") == []


def test_class_folders_become_labels_in_sorted_order(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 6, ("dog", "cat", "a bird"))
    pack(tmp_path / "images", tmp_path / "set", _SMALL)
    shard_set = ShardSet.open(tmp_path / "set")
    assert shard_set.manifest.classes == ("a bird", "cat", "dog")
    assert all_labels(shard_set) == [0, 0, 1, 1, 2, 2]


def test_flat_folder_or_single_class_has_no_labels(tmp_path: Path) -> None:
    draw_folder(tmp_path / "parent" / "photos", 3)
    for number, src in enumerate((tmp_path / "parent", tmp_path / "parent" / "photos")):
        pack(src, tmp_path / f"set{number}", _SMALL)
        shard_set = ShardSet.open(tmp_path / f"set{number}")
        assert (shard_set.manifest.classes, all_labels(shard_set)) == ((), [-1, -1, -1])
        with tarfile.open(shard_set.tar_path(0)) as tar:
            assert all(name.endswith(".jpg") for name in tar.getnames())


def test_list_file_with_numbers_or_names_as_labels(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 3)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    for number, (labels, classes, expected) in enumerate(
        [("70 ", (), [7, 0, -1]), ("yxy", ("x", "y"), [1, 0, 1]), ("   ", (), [-1, -1, -1])]
    ):
        lines = [f"images/{name}\t{label}".rstrip() for name, label in zip(names, labels, strict=True)]
        (tmp_path / "list.txt").write_text("\n".join(lines) + "\n\n")
        pack(tmp_path / "list.txt", tmp_path / f"set{number}", _SMALL)
        shard_set = ShardSet.open(tmp_path / f"set{number}")
        assert (shard_set.manifest.classes, all_labels(shard_set)) == (classes, expected)


def test_list_file_with_byte_order_mark_and_label_minus_one(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 3)
    names = sorted(path.name for path in images.iterdir())
    lines = [f"images/{name}\t{label}" for name, label in zip(names, ("2", "-1", "3.0"), strict=True)]
    (tmp_path / "list.txt").write_text("\r\n".join(lines), encoding="utf-8-sig")
    pack(tmp_path / "list.txt", tmp_path / "set", _SMALL)
    shard_set = ShardSet.open(tmp_path / "set")
    assert (shard_set.manifest.classes, all_labels(shard_set)) == ((), [2, -1, 3])


def test_list_file_with_paths_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    draw_folder(tmp_path / "home", 2)
    draw_folder(tmp_path / "~odd", 1)
    paths = [f"~/{path.name}" for path in (tmp_path / "home").iterdir()] + ["~odd/" + os.listdir(tmp_path / "~odd")[0]]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    assert pack(tmp_path / "list.txt", tmp_path / "set", _SMALL).manifest.num_samples == 3


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("a.jpg\t1\nb.jpg\t99999999999\n", r"list\.txt: b\.jpg: the label 99999999999 is not a whole number from 0"),
        ("a.jpg\t1\nb.jpg\t-2\n", r"list\.txt: b\.jpg: the label -2 is not"),
        ("a.jpg\t0.5\n", r"list\.txt: a\.jpg: the label 0\.5 is not"),
        ("a.jpg\towl\nb.jpg\t-1\n", r"list\.txt: a\.jpg: the label 'owl' is a name, but '-1' is a number"),
        ("a.jpg\nb\0.jpg\n", r"list\.txt: NUL byte in line 2"),
        ("", r"list\.txt lists no images"),
        (" \n\n", r"list\.txt lists no images"),
    ],
)
def test_errors_of_list_files(tmp_path: Path, content: str, error: str) -> None:
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ShardError, match=error):
        pack(tmp_path / "list.txt", tmp_path / "set", _SMALL)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("fault", ["junk", "cut", "flipped"])
@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2"])
def test_damaged_compressed_tar_is_named(tmp_path: Path, suffix: str, fault: str) -> None:
    source = tmp_path / f"images.tar.{suffix}"
    with tarfile.open(source, f"w:{suffix}") as tar:
        tar.add(draw_folder(tmp_path / "images", 3), "images")
    whole = source.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle : middle + 64]) + whole[middle + 64 :]
    source.write_bytes({"junk": b"no tar" * 100, "cut": whole[:middle], "flipped": flipped}[fault])
    with pytest.raises(ShardError, match=rf"images\.tar\.{suffix} cannot be decompressed \(.+\); fetch it again"):
        pack(source, tmp_path / "set", _SMALL)
    assert not (tmp_path / "set").exists()


def test_truncated_tar_is_named_by_its_source_not_its_copy(tmp_path: Path) -> None:
    plain = tmp_path / "images.tar"
    with tarfile.open(plain, "w") as tar:
        tar.add(draw_folder(tmp_path / "images", 3), "images")
    plain.write_bytes(plain.read_bytes()[:3000])
    (tmp_path / "images.tgz").write_bytes(gzip.compress(plain.read_bytes()))
    for source in (str(tmp_path / "images.tgz"), plain.as_uri()):
        with pytest.raises(ShardError, match=f"^{re.escape(source)} is (truncated|not a complete tar)") as raised:
            pack(source, tmp_path / "set", _SMALL)
        assert "packing.tar" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "tgz", "tar.bz2"])
def test_tar_packs_like_its_folder(tmp_path: Path, suffix: str) -> None:
    images = draw_folder(tmp_path / "images", 6, ("cat", "dog"))
    mode = {"tar": "w", "tgz": "w:gz"}.get(suffix, f"w:{suffix.removeprefix('tar.')}")
    with tarfile.open(tmp_path / f"images.{suffix}", mode) as tar:
        for path in sorted(images.rglob("*")):
            tar.add(path, path.relative_to(tmp_path), recursive=False)
    pack(images, tmp_path / "from_folder", _SMALL)
    pack(tmp_path / f"images.{suffix}", tmp_path / "from_tar", _SMALL)
    folder, archive = ShardSet.open(tmp_path / "from_folder"), ShardSet.open(tmp_path / "from_tar")
    assert all_payloads(folder) == all_payloads(archive)
    assert all_labels(folder) == all_labels(archive)
    assert folder.manifest.classes == archive.manifest.classes
    assert sorted(path.name for path in (tmp_path / "from_tar").iterdir()) == [
        "index",
        "manifest.json",
        "rejected.jsonl",
        "shards",
    ]


def test_webdataset_tar_keeps_its_labels(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "foreign.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number, label in enumerate((5, 3)):
            for extension, content in (("cls", str(label).encode()), ("jpg", encoded(drawn_image(number)))):
                add_to_tar(tar, f"folder/größe {number}.{extension}", content)
    pack(tmp_path / "foreign.tar", tmp_path / "set", _SMALL)
    assert all_labels(ShardSet.open(tmp_path / "set")) == [5, 3]


def test_undecodable_images_are_listed_with_a_reason(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 4)
    whole = encoded(drawn_image(9, 150, 100))
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").write_bytes(b"")
    (images / "text.jpg").write_bytes(b"hello")
    (images / "large.png").write_bytes(encoded(drawn_image(1, 200, 200), "PNG"))
    (images / "notes.txt").write_bytes(b"ignored")
    (images / "animated.gif").write_bytes(encoded(drawn_image(2), "GIF"))
    os.symlink("nowhere", images / "dangling.jpg")
    report = pack(images, tmp_path / "set", PackOptions(max_pixels=30_000), workers=1)
    rejected = _rejected(tmp_path / "set")
    assert set(rejected) == {"cut.jpg", "empty.png", "text.jpg", "large.png", "dangling.jpg"}
    assert "truncated" in rejected["cut.jpg"]
    assert rejected["empty.png"] == "the file is empty"
    assert rejected["text.jpg"].startswith("not an image: an unknown format")
    assert rejected["large.png"] == "200x200 is more than 30000 pixels"
    assert rejected["dangling.jpg"] == "No such file or directory"
    assert (report.manifest.num_samples, report.num_rejected, report.num_ignored) == (5, 5, 1)


def test_rejected_images_are_counted_by_reason(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 2)
    whole = encoded(drawn_image(9, 150, 100))
    for number in range(3):
        (images / f"cut{number}.jpg").write_bytes(whole[: len(whole) // 2 - 40 * number])
    (images / "text.jpg").write_bytes(b"hello")
    report = pack(images, tmp_path / "set", _SMALL)
    assert report.rejected is not None and sorted(report.rejected.values()) == [1, 3]
    assert pack(images, tmp_path / "set", _SMALL).rejected == report.rejected
    first, second, third = describe_rejected(report.rejected, "set/rejected.jsonl")
    assert first == "rejected 4 images, listed in set/rejected.jsonl:"
    assert second.startswith("  3 x ") and "truncated" in second and third == "  1 x not an image: an unknown format"
    many = Counter({f"reason {number}": 9 - number for number in range(9)})
    assert describe_rejected(many, "log")[-1] == "  10 x other reasons" and describe_rejected(Counter(), "log") == []


def test_pipes_and_sockets_are_rejected_without_blocking(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 2)
    os.mkfifo(images / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(images / "socket.png"))  # such paths are at most 108 bytes long
        pack(images, tmp_path / "set", _SMALL)
    assert _rejected(tmp_path / "set") == {"pipe.jpg": "not a regular file", "socket.png": "not a regular file"}
    os.mkfifo(tmp_path / "images.tar")
    with pytest.raises(ShardError, match="neither a folder nor a regular file"):
        pack(tmp_path / "images.tar", tmp_path / "other", _SMALL)


def test_shuffle_and_dedup(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 20)
    shutil.copy(images / "image 003.jpg", images / "image 003 again.jpg")
    pack(images, tmp_path / "sorted", PackOptions(dedup=True))
    pack(images, tmp_path / "shuffled", PackOptions(shuffle=1, dedup=True))
    in_order, shuffled = (all_payloads(ShardSet.open(tmp_path / name)) for name in ("sorted", "shuffled"))
    assert in_order != shuffled
    assert sorted(in_order) == sorted(shuffled)
    assert len(in_order) == 20
    assert list(_rejected(tmp_path / "sorted")) == ["image 003.jpg"]  # "image 003 again.jpg" sorts before it


def test_sample_keys() -> None:
    assert sample_key(3, "a b/c.d.jpg") == "000000003_a_b_c_d"
    assert sample_key(3, "größe.jpg") == "000000003_gr_e"
    assert sample_key(3, "猫.jpg") == "000000003"
    assert len(sample_key(10**9, "x" * 300 + ".jpg")) < 90


def test_folder_accepts_only_the_same_packing_again(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", 6)
    first = pack(images, tmp_path / "set", _SMALL)
    before = file_contents(tmp_path / "set")
    again = replace(first, is_new=False)
    assert pack(images, tmp_path / "set", _SMALL) == again  # packing again changes nothing
    assert file_contents(tmp_path / "set") == before
    (tmp_path / "set" / "rejected.jsonl").rename(tmp_path / "aside")
    assert pack(images, tmp_path / "set", _SMALL) == replace(again, rejected=None)
    (tmp_path / "aside").rename(tmp_path / "set" / "rejected.jsonl")
    with pytest.raises(ShardError, match="already contains another shard set"):
        pack(images, tmp_path / "set", PackOptions(max_side=10))
    with pytest.raises(ShardError, match="has other files"):
        pack(images, images, _SMALL)
    assert file_contents(tmp_path / "set") == before


def test_foreign_files_in_shard_folders_are_kept(tmp_path: Path) -> None:
    images, out = draw_folder(tmp_path / "images", 6), tmp_path / "set"
    for folder in ("shards", "index"):
        (out / folder).mkdir(parents=True)
        (out / folder / "mine.tar").write_text("precious")
        before = file_contents(out)
        with pytest.raises(ShardError, match=r"has other files, such as \w+/mine.tar; choose a new folder"):
            pack(images, out, _SMALL)
        assert file_contents(out) == before
        shutil.rmtree(out / folder)


def test_same_names_with_other_content_is_another_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, out = draw_folder(tmp_path / "images", 50), tmp_path / "set"
    options = PackOptions(shard_bytes=20_000, dedup=True)
    _interrupted(images, out, 1, monkeypatch)
    other = shutil.copytree(images, tmp_path / "other")
    (other / "image 049.jpg").write_bytes(encoded(drawn_image(77)) + b"another")
    with pytest.raises(ShardError, match="interrupted packing of another source"):
        pack(other, out, options)
    pack(images, out, options)
    with pytest.raises(ShardError, match="already contains another shard set"):
        pack(other, out, options)


class _Stop(Exception):
    pass


def _interrupted(images: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack until ``after`` shards are complete, then stop with an exception."""
    from shards.packing.shard_writer import ShardWriter

    whole = ShardWriter.finish
    left = [after]

    def finish(writer: ShardWriter) -> object:
        if left[0] == 0:
            raise _Stop
        left[0] -= 1
        return whole(writer)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", finish)
        with pytest.raises(_Stop):
            pack(images, out, PackOptions(shard_bytes=20_000, dedup=True))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_packing_resumes_to_the_same_set(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_folder(tmp_path / "images", 50)
    (images / "broken.jpg").write_bytes(b"text")
    shutil.copy(images / "image 000.jpg", images / "z same.jpg")
    options = PackOptions(shard_bytes=20_000, dedup=True)
    expected: PackReport = pack(images, tmp_path / "unbroken", options)
    out = tmp_path / "set"
    _interrupted(images, out, after, monkeypatch)
    with pytest.raises(ShardError, match="not a finished shard set"):
        ShardSet.open(out)
    with pytest.raises(ShardError, match="interrupted packing of another source"):
        pack(images, out, PackOptions(shard_bytes=30_000))
    for torn in (".packing.jsonl.partial", ".manifest.json.partial", "shards/.000001.tar.partial"):
        (out / torn).write_text("torn by a kill")
    journal = out / "packing.jsonl"
    journal.write_text(journal.read_text() + '{"shard": {"na')  # a line torn by a kill
    assert pack(images, out, options) == expected
    assert file_contents(out) == file_contents(tmp_path / "unbroken")


@pytest.mark.parametrize("lost", ["shards/000000.tar", "index/000001.npy", "index/000000.idx"])
def test_lost_shards_are_packed_again(tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, out = draw_folder(tmp_path / "images", 50), tmp_path / "set"
    options = PackOptions(shard_bytes=20_000, dedup=True)
    pack(images, tmp_path / "unbroken", options)
    _interrupted(images, out, 2, monkeypatch)
    (out / lost).unlink()
    pack(images, out, options)
    assert file_contents(out) == file_contents(tmp_path / "unbroken")


@pytest.mark.parametrize("first_line", ["garbage", "{}", "[1]"])
def test_damaged_journal_is_refused(tmp_path: Path, first_line: str) -> None:
    images, out = draw_folder(tmp_path / "images", 6), tmp_path / "set"
    out.mkdir()
    (out / "packing.jsonl").write_text(first_line + "\n")
    with pytest.raises(ShardError, match="delete it or choose a new folder"):
        pack(images, out, _SMALL)
