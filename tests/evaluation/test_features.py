from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_backbone import class_folder, tiny_backbone

from streamtrain.data.still_images import centre_crop
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.features import compute_features, pixel_features, read_pixels, report_unusable
from streamtrain.evaluation.images import LabelledImages, match_classes, open_images, split_images, split_indices

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folder(tmp_path_factory.mktemp("images") / "set")


def test_batches_do_not_change_the_features(folder: Path) -> None:
    images = open_images(folder)
    backbone = tiny_backbone()
    features, is_usable = compute_features(backbone.model, images, size=32, mean=MEAN, std=STD, batch_size=7, workers=3)
    assert features.shape == (20, 32) and features.dtype == torch.float32 and is_usable.all()
    assert images.labels.tolist() == [0] * 10 + [1] * 10
    for index in (0, 6, 7, 19):
        crop = torch.from_numpy(centre_crop(images.decode(index), 32, 32).copy()).permute(2, 0, 1)
        normalised = (crop / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            alone = backbone.model.forward_features(normalised[None]).cls[0]
        torch.testing.assert_close(features[index], alone, rtol=1e-4, atol=1e-4)


def test_centre_crop_takes_the_middle_square() -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = 255
    assert (centre_crop(Image.fromarray(pixels), 40, 40) == 255).all()
    whole = centre_crop(Image.fromarray(pixels), 60, 40)  # zoomed in by half: the margins are well outside
    assert whole.shape == (40, 40, 3) and (whole == 255).all()
    ramp = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (40, 100, 3)).copy()
    reference = Image.fromarray(ramp).resize((50, 20), Image.Resampling.BICUBIC).crop((15, 0, 35, 20))
    np.testing.assert_allclose(centre_crop(Image.fromarray(ramp), 20, 20), np.asarray(reference), atol=1)


def test_pixels_as_features(folder: Path) -> None:
    pixels, is_usable = read_pixels(open_images(folder), size=16, batch_size=6)
    assert pixels.shape == (20, 3 * 16 * 16) and is_usable.all() and len(is_usable) == 20
    features = pixel_features(pixels, MEAN, STD)
    assert features.shape == pixels.shape and features.abs().max() < 3
    # planes of red, green and blue
    assert torch.allclose(features[3, 0], (pixels[3, 0] / 255 - MEAN[0]) / STD[0])
    assert torch.allclose(features[3, 256], (pixels[3, 1] / 255 - MEAN[1]) / STD[1])


def test_split_is_fixed_disjoint_and_complete(folder: Path) -> None:
    images = open_images(folder)
    train, test = split_images(images)
    again, _ = split_images(open_images(folder))
    names = [{part.read(index)[1] for index in range(len(part))} for part in (train, test, images, again)]
    assert len(test) == 4 and not names[0] & names[1] and names[0] | names[1] == names[2]
    assert names[3] == names[0]
    assert all(train.classes[train.labels[i]] in train.read(i)[1] for i in range(len(train)))


@pytest.mark.parametrize("count", [5, 14, 20, 23])
def test_five_splits_test_every_image_once(count: int) -> None:
    images = LabelledImages("set", np.zeros(count, np.int64), (), lambda index: (b"", str(index)))
    splits = split_indices(images)
    assert len(splits) == 5
    assert np.array_equal(np.sort(np.concatenate([test for _, test in splits])), np.arange(count))
    for train, test in splits:
        assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(count))
    # the first split is that of every earlier result
    assert [part.read(0)[1] for part in split_images(images)] == [str(splits[0][0][0]), str(splits[0][1][0])]
    assert len(splits[0][1]) == count // 5


def test_features_are_no_inference_tensors(folder: Path) -> None:
    images = open_images(folder)
    features, _ = compute_features(tiny_backbone().model, images, size=32, mean=MEAN, std=STD)
    labels = torch.from_numpy(images.labels)
    weight = torch.zeros(32, 2, requires_grad=True)
    torch.nn.functional.cross_entropy(features @ weight, labels).backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_classes_are_matched_by_name(folder: Path, tmp_path: Path) -> None:
    train = open_images(folder)
    other = open_images(class_folder(tmp_path / "other", ("down",)))
    assert match_classes(train, other).labels.tolist() == [1] * 10
    stranger = open_images(class_folder(tmp_path / "stranger", ("down", "sideways")))
    with pytest.raises(StreamtrainError, match="sideways"):
        match_classes(train, stranger)


def test_each_error_is_one_line(folder: Path, tmp_path: Path) -> None:
    empty, loose = tmp_path / "empty", tmp_path / "loose"
    empty.mkdir()
    loose.mkdir()
    Image.new("RGB", (8, 8)).save(loose / "a.png")
    for path, words in ((tmp_path / "none", "not a folder"), (empty, "no images"), (loose, "no class subfolders")):
        with pytest.raises(StreamtrainError, match=words):
            open_images(path)
    broken = class_folder(tmp_path / "broken", each=1)
    (broken / "down" / "bad.jpg").write_bytes(b"no image")
    images = open_images(broken)
    _, is_usable = compute_features(tiny_backbone().model, images, size=8, mean=MEAN, std=STD)
    with pytest.raises(StreamtrainError, match=r"bad\.jpg"):
        report_unusable(images, is_usable)
    with pytest.raises(StreamtrainError, match="too few to split"):
        split_images(images)
