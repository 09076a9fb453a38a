"""Lines about the images of a packing, and its page of images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from drawn_images import draw_folder, packed_set
from PIL import Image

from shards.format.pixels import PixelFormat
from shards.format.tar_members import NO_LABEL
from shards.packing.pack import PackOptions, pack
from shards.packing.summary import contact_sheet, count_reasons, describe_classes, describe_images, split_warning
from shards.reading.shard_set import ShardSet


def test_classes_are_named_with_their_counts() -> None:
    assert describe_classes([0, 1, 1], ("cat", "dog")) == ["found 3 images in 2 classes: cat 1, dog 2"]
    assert describe_classes([7, 7], ()) == ["found 2 images in 1 class: 7 2"]
    lines = describe_classes([0, NO_LABEL, NO_LABEL], ("cat",))
    assert lines[1:] == ["images in no class folder, which have no label: 2"]
    (unlabelled,) = describe_classes([NO_LABEL] * 5, ())
    assert unlabelled.startswith("found 5 images without labels")


def test_many_classes_are_cut() -> None:
    labels = [label for label in range(100) for _ in range(label + 1)]
    (line,) = describe_classes(labels, [f"n{number}" for number in range(100)])
    assert line.endswith("n9 10, n10 11, and 89 more (1 to 100 images in each class)")


@pytest.mark.parametrize("classes", [("train", "val"), ("Test", "Training"), ("train",), ("test", "train", "extra")])
def test_parts_of_a_data_set_are_recognised(classes: tuple[str, ...]) -> None:
    assert "pack each part" in (split_warning(classes) or "")


@pytest.mark.parametrize("classes", [(), ("cat", "dog"), ("cat", "dog", "test"), ("trains", "planes")])
def test_other_classes_give_no_warning(classes: tuple[str, ...]) -> None:
    assert split_warning(classes) is None


def test_sizes_formats_and_channels(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, mode, size in [
        ("a.jpg", "RGB", (64, 48)), ("b.jpg", "L", (32, 32)), ("c.png", "RGBA", (200, 100)), ("d.bmp", "RGB", (64, 48)),
    ]:  # fmt: skip
        Image.new(mode, size).save(folder / name)
    pack(folder, tmp_path / "set")
    sizes, formats = describe_images(ShardSet.open(tmp_path / "set"))
    assert sizes == "sizes: median 64 x 48, smallest 32 x 32, largest 200 x 100 pixels"
    assert sorted(formats.removeprefix("formats: ").split(", ")) == [
        "JPEG colour 1", "JPEG grey 1", "PNG colour 1", "PNG colour with alpha 1",
    ]  # fmt: skip


def test_the_index_of_some_shards_of_a_large_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.packing.summary._MAX_SHARDS", 2)
    shard_set = packed_set(tmp_path, 60)
    ends = [len(shard_set.records(shard)) for shard in (0, shard_set.num_shards - 1)]
    assert shard_set.num_shards > 2
    assert describe_images(shard_set)[0].startswith(f"sizes of {sum(ends)} images, spread over the set: ")


def test_large_images_are_advised_to_be_shrunk(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2000, 1500)).save(tmp_path / "images" / "a.jpg")
    pack(tmp_path / "images", tmp_path / "set")
    sizes, _, advice = describe_images(ShardSet.open(tmp_path / "set"))
    assert sizes == "sizes: all 2000 x 1500 pixels" and "--max-side 512" in advice


def test_large_images_of_other_channels_are_advised_to_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tifffile")
    monkeypatch.setattr("shards.packing.summary._LARGE_PIXELS", 100)
    (tmp_path / "src").mkdir()
    np.save(tmp_path / "src" / "a.npy", np.ones((20, 30, 4), np.uint16))
    pack(str(tmp_path / "src"), str(tmp_path / "set"), PackOptions(pixels=PixelFormat(4, "uint16")))
    line = describe_images(ShardSet.open(tmp_path / "set"))[-1]
    assert line.startswith("large images: ") and "--tiles 512" in line and "--max-side" not in line


def test_the_sheet_shows_images_of_every_shard(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", 60, ("cat", "dog\x1b[31m"))
    manifest = pack(tmp_path / "images", tmp_path / "set").manifest
    page = np.asarray(Image.open(io.BytesIO(contact_sheet(ShardSet.open(tmp_path / "set"), manifest.classes))))
    assert page.shape == (6 * 190 + 12, 8 * 172 + 12, 3)
    tiles = page[12:, 12:].reshape(6, 190, 8, 172, 3)[:, :160, :, :160]
    assert all(np.ptp(tiles[row, :, column]) > 50 for row in range(6) for column in range(8))


def test_reasons_are_counted_without_sizes_but_with_the_pixel_format() -> None:
    reasons = ["900x60 pixels are too many; raise --max-pixels", "80x7 pixels are too many"]
    reasons += ["it has 3 channels of uint8, not 13 channels of uint16"] * 2
    counts = count_reasons("".join(json.dumps({"reason": reason}) + "\n" for reason in reasons).encode())
    assert counts == {"NxN pixels are too many": 2, "it has 3 channels of uint8, not 13 channels of uint16": 2}
