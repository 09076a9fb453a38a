"""Every kind of source is listed in full: images are taken, all other files are counted, and errors name the remedy."""

from __future__ import annotations

import gzip
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from drawn_images import add_to_tar, all_labels, all_payloads, draw_folder, drawn_image, encoded
from PIL import features

from shards.errors import ShardError
from shards.format.tally import Tally
from shards.packing import inputs, list_file
from shards.packing.inputs import list_inputs
from shards.packing.pack import pack
from shards.packing.verify import verify
from shards.reading.shard_set import ShardSet

_ROOT = Path(__file__).resolve().parents[3]


def _strays(folder: Path) -> Path:
    """Add files that are not images, or that should not be taken as such, to a folder of images."""
    for name in ("IMG_1.HEIC", "IMG_2.heic", "notes.txt", "._cat.jpg", "scraped", "cat/.checkpoints/copy.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"stray")
    (folder / "cat" / "drawing.gif").write_bytes(encoded(drawn_image(7), "GIF"))
    return folder


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_ROOT / "tools" / tool), "--workers", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_pack_prints_what_it_passes_over_by_kind(tmp_path: Path) -> None:
    images = _strays(draw_folder(tmp_path / "images", 4, ("cat", "dog")))
    done = _run("make_shards.py", "--src", images, "--out", tmp_path / "set")
    assert done.returncode == 0 and "packed 5 images" in done.stdout.splitlines()[-1]
    assert "5 other files ignored" in done.stdout
    assert "files of other kinds, passed over: .heic 2, .txt 1, no suffix 1" in done.stdout
    assert "HEIC is not supported" in done.stdout
    assert "hidden files, such as ._NAME of macOS, passed over: 1" in done.stdout
    assert "hidden folders, passed over: 1" in done.stdout


def test_a_folder_without_images_is_refused_with_the_kinds_found(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ShardError, match=r"no images in .*: \.heic 1; HEIC is not supported"):
        list_inputs(str(tmp_path))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot decode AVIF")
def test_avif_is_packed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.avif").write_bytes(encoded(drawn_image(1), "AVIF"))
    assert pack(tmp_path / "images", tmp_path / "set").manifest.num_samples == 1


def test_missing_avif_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = Tally()
    tally.add_file("a.avif")
    monkeypatch.setattr(features, "check", lambda name: False)
    assert tally.lines()[1].startswith("AVIF needs Pillow 11.3 or newer")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_packs_like_its_folder(tmp_path: Path, method: int) -> None:
    folder = draw_folder(tmp_path / "images", 6, ("cat", "dog"))
    with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as archive:
        archive.writestr("../cat/._x.jpg", b"resource fork")
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    report = pack(tmp_path / "images.zip", tmp_path / "from_zip", workers=2)
    pack(folder, tmp_path / "from_folder")
    packed, expected = ShardSet.open(tmp_path / "from_zip"), ShardSet.open(tmp_path / "from_folder")
    assert all_payloads(packed) == all_payloads(expected) and all_labels(packed) == all_labels(expected)
    assert packed.manifest.classes == ("cat", "dog") and report.num_ignored == 1
    assert verify(tmp_path / "from_zip") == []


def test_zip_with_labels_links_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"IMG.{number}.jpg", encoded(drawn_image(number)))
            archive.writestr(f"IMG.{number}.cls", str(number))
        archive.writestr(link, "IMG.0.jpg")
    content = bytearray(path.read_bytes())
    content[content.index(encoded(drawn_image(1))) + 50] ^= 1
    path.write_bytes(content)
    report = pack(path, tmp_path / "set")
    assert all_labels(ShardSet.open(tmp_path / "set")) == [0, 2] and report.num_rejected == 1
    assert "Bad CRC-32" in (tmp_path / "set" / "rejected.jsonl").read_text()
    assert "hard or symbolic links, passed over: 1" in report.passed_over.lines()
    path.write_bytes(content[:-30])
    with pytest.raises(ShardError, match=r"x\.zip is not a zip archive that can be read"):
        list_inputs(str(path))
    with pytest.raises(ShardError, match="a zip is read from a local disk only; copy it there first"):
        list_inputs("https://example.org/x.zip")


def test_encrypted_zip_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", b"x")
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ShardError, match=r"no images in .*; encrypted files, passed over: 1"):
        list_inputs(str(tmp_path / "x.zip"))


def test_folder_of_tars_points_to_the_index_command(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        add_to_tar(tar, "a.jpg", encoded(drawn_image(1)))
    with pytest.raises(ShardError, match=f"no images in {tmp_path}; to use its 1 .tar file, run: streamtrain index"):
        list_inputs(str(tmp_path))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"caption": ["x"]}), tmp_path / "000.parquet")
    with pytest.raises(ShardError, match=r"no column of bytes; .* run: streamtrain index --src "):
        list_inputs(str(tmp_path))


def test_lists_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_file, "MAX_ITEMS", 3)
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\n" * 4)
    with pytest.raises(ShardError, match="lists more than 3 images; make several sets of it"):
        list_inputs(str(path))
    path.write_text("a" * 100_000)
    with pytest.raises(ShardError, match="line 1 is longer than 65536 characters"):
        list_inputs(str(path))
    path.write_text("a.jpg\t" + "1" * 5000)
    assert len(list_inputs(str(path)).items) == 1  # a name, not a number that cannot be parsed
    path.write_text("a\x0bb.jpg\nc\u2028.jpg\n")  # characters that end a line elsewhere
    assert [item.name for item in list_inputs(str(path)).items] == ["a\x0bb.jpg", "c\u2028.jpg"]


def test_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_FREE_EXPANSION", 1 << 20)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(bytes(8 << 20)))
    with pytest.raises(ShardError, match=r"x\.tar\.gz unpacks to more than \d+ bytes; unpack it first"):
        pack(tmp_path / "x.tar.gz", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("call", [os.stat, os.scandir])
def test_source_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., object]
) -> None:
    def fail(path: object = ".", *arguments: object, **settings: object) -> object:
        if str(path).startswith(str(tmp_path)):
            raise OSError(116, "Stale file handle", str(path))
        return call(path, *arguments, **settings)

    draw_folder(tmp_path, 2)
    monkeypatch.setattr(os, call.__name__, fail)
    with pytest.raises(ShardError, match=r"cannot be read \(Stale file handle\)"):
        list_inputs(str(tmp_path))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_hidden_folders_of_an_archive_are_no_classes(kind: str, tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "images", 6, ("cat", "dog"))
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        draw_folder(folder / "cat" / hidden, 1)
        draw_folder(folder / hidden, 1)
    path = tmp_path / f"images.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(folder, ".")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.jpg")):
                archive.write(file, file.relative_to(folder))
    listed = list_inputs(str(path))
    assert listed.classes == ("cat", "dog") and len(listed.items) == 6
    assert any("hidden" in line and line.endswith(": 4") for line in listed.passed_over.lines())


def test_names_with_backslashes_of_a_zip_have_folders(tmp_path: Path) -> None:
    path = tmp_path / "windows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, label in enumerate(("cat", "dog")):
            name = zipfile.ZipInfo("x")
            name.filename = f"set\\{label}\\{number}.jpg"
            archive.writestr(name, encoded(drawn_image(number)))
    listed = list_inputs(str(path))
    assert listed.classes == ("cat", "dog") and [item.label for item in listed.items] == [0, 1]
