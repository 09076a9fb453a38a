"""Images with maps in a parallel folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mapped_folders import mapped_folder
from PIL import Image

from shards.format.pixels import RGB
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.label_maps import CLASS_IDS, DEPTH, open_mapped, split_mapped


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return mapped_folder(tmp_path, 10)


@pytest.mark.parametrize("scale", [1, 2])
def test_the_crop_of_a_map_shows_the_same_place_as_that_of_its_image(tmp_path: Path, scale: int) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    rows, columns = np.mgrid[0:60, 0:90]
    ids = (rows // 10 + 6 * (columns // 10)).astype(np.uint8)
    Image.fromarray(np.stack([ids] * 3, -1)).save(tmp_path / "images" / "x.png")
    Image.fromarray(ids[::scale, ::scale]).save(tmp_path / "masks" / "x.png")
    mapped = open_mapped(tmp_path / "images", tmp_path / "masks", CLASS_IDS, RGB)
    crop, labels = mapped.crop(0, 40, 32)
    assert labels is not None and labels.shape == (32, 32)
    # resampling blurs only the borders of the squares
    assert (np.abs(crop[..., 0].astype(int) - labels) <= 1).mean() > 0.6
    centres = slice(2, None, 7)
    assert (crop[centres, centres, 0] == labels[centres, centres]).mean() > 0.5


def test_images_without_a_map_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "masks" / "a" / "3.png").unlink()
    mapped = open_mapped(folder / "images", folder / "masks", CLASS_IDS, RGB)
    assert len(mapped) == 9 and "1 of 10 images" in caplog.text and "3.png" in caplog.text
    train, test = split_mapped(mapped)
    assert len(train) == 8 and len(test) == 1
    names = {Path(each.read(index)[1]).name for each in (train, test) for index in range(len(each))}
    assert names == {f"{index}.png" for index in range(10) if index != 3}


def test_each_image_has_its_own_map(folder: Path) -> None:
    mapped = open_mapped(folder / "images", folder / "depth", DEPTH, RGB)
    for index in range(len(mapped)):
        path = Path(mapped.read(index)[1])
        assert Path(mapped.images.sample_key(index)).stem == path.stem
        height, width = (expected := np.load(path)).shape
        assert np.array_equal(mapped.read_map(index, width, height), expected)


def test_ignored_ids_are_unlabelled(folder: Path) -> None:
    mapped = open_mapped(folder / "images", folder / "masks", CLASS_IDS, RGB, ignored=(0,))
    height, width = np.load(folder / "depth" / "a" / "0.npy").shape
    assert set(np.unique(mapped.read_map(0, width, height)).tolist()) == {-1, 3}


def test_an_unusable_image_has_no_map(folder: Path) -> None:
    path = folder / "images" / "a" / "0.png"
    path.write_bytes(path.read_bytes()[:100])
    mapped = open_mapped(folder / "images", folder / "masks", CLASS_IDS, RGB)
    crop, labels = mapped.crop(0, 32, 32)
    assert labels is None and crop.shape == (32, 32, 3) and "0.png" in mapped.images.unusable.new_reasons()


def test_maps_that_do_not_fit_are_refused(folder: Path) -> None:
    mapped = open_mapped(folder / "images", folder / "masks", CLASS_IDS, RGB)
    Image.new("L", (40, 80)).save(mapped.read(0)[1])
    with pytest.raises(StreamtrainError, match=r"0.png: it has 40x80 pixels, its image \d+x\d+"):
        mapped.crop(0, 32, 32)
    Image.new("RGB", (40, 80)).save(mapped.read(1)[1])
    with pytest.raises(StreamtrainError, match="picture in colour"):
        mapped.crop(1, 32, 32)


def test_folders_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(StreamtrainError, match=r"no image of .* has a label file: .*a/0.png needs"):
        open_mapped(folder / "images", folder / "depth", CLASS_IDS, RGB)
    with pytest.raises(StreamtrainError, match=r"--labels .* is not a folder"):
        open_mapped(folder / "images", folder / "nowhere", CLASS_IDS, RGB)
    (folder / "images" / "manifest.json").write_text("{}")
    with pytest.raises(StreamtrainError, match="is a shard set, whose maps are in the set; remove --labels"):
        open_mapped(folder / "images", folder / "masks", CLASS_IDS, RGB)
