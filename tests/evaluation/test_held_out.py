from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import drawn_image, encoded, packed_set
from tiny_backbone import class_folder

from shards.packing.pack import pack
from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.features import crop_batches
from streamtrain.evaluation.held_out import HeldOut, first_images, held_out, stratified_indices
from streamtrain.evaluation.images import LabelledImages, open_images, split_images


def config(**evaluation: object) -> Config:
    return build({"evaluation": evaluation})


def test_a_labelled_set_is_split_and_an_unlabelled_one_has_a_reason(tmp_path: Path) -> None:
    labelled = packed_set(tmp_path / "a", 60, ("x", "y"), shard_bytes=5_000)
    found, why = held_out(config(images=20), labelled)
    assert found is not None and not why
    assert len(found.train) == 20 and len(found.test) == 5
    images = found.test
    names = [images.read(index)[1] for index in range(5)] + [found.train.read(index)[1] for index in range(20)]
    assert len(set(names)) == 25 and all("/shards/" in name for name in names)
    assert images.decode(0).size[0] >= 32
    unlabelled = packed_set(tmp_path / "b", 20)
    assert held_out(config(), unlabelled) == (None, "data.shards has no labels")
    assert len(first_images(unlabelled, 3)) == 3


def test_named_sets_must_have_labels(tmp_path: Path) -> None:
    shard_set = packed_set(tmp_path / "a", 8)
    folder, test = class_folder(tmp_path / "train", each=20), class_folder(tmp_path / "test", each=3)
    found, _ = held_out(config(train=str(folder), test=str(test), images=24), shard_set)
    assert found is not None and (len(found.train), len(found.test)) == (24, 6)
    assert set(found.train.labels.tolist()) == {0, 1}
    with pytest.raises(StreamtrainError, match="no label"):
        held_out(config(train=str(tmp_path / "a" / "set")), shard_set)


def test_a_folder_of_other_channels_is_refused_at_the_start(tmp_path: Path) -> None:
    shard_set, folder = packed_set(tmp_path / "a", 8), class_folder(tmp_path / "train", each=5)
    plain = {"jitter": {"probability": 0}, "grey": 0, "solarize": {"global_probability": [0]}, "mean": [0], "std": [1]}
    one = build({"data": {"channels": 1}, "crops": plain, "evaluation": {"train": str(folder)}})
    with pytest.raises(StreamtrainError, match=r"none of 4 images of .* it has 3 channels of uint8, not 1 channel of"):
        held_out(one, shard_set)


def test_strata_are_ascending_and_spread() -> None:
    indices = stratified_indices(10_000_000_000, 100)
    assert len(indices) == 100 and (np.diff(indices) > 0).all() and np.diff(indices).max() < 2.01e8
    assert stratified_indices(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert len(set(stratified_indices(11, 10).tolist())) == len(stratified_indices(11, 10)) <= 10


def test_a_damaged_image_is_replaced_by_grey_and_named_once(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "train", each=8)
    (folder / "down" / "003.png").write_bytes(b"no image")
    shard_set = packed_set(tmp_path / "a", 8)
    found, _ = held_out(config(train=str(folder), images=40), shard_set)
    assert found is not None
    batches = [batch for _ in range(2) for one in (found.train, found.test) for batch in crop_batches(one, 8, 8, 5, 2)]
    usable = torch.cat([is_usable for _, is_usable in batches])
    crops = torch.cat([crops for crops, _ in batches])
    assert len(usable) == 32 and int((~usable).sum()) == 2
    assert (crops[~usable] == 128).all() and (crops[usable].flatten(1).double().std(1) > 1).all()
    assert "003.png" in found.test.unusable.new_reasons() and found.train.unusable.new_reasons() == ""


@pytest.mark.parametrize(
    "error", [ValueError("Decompressed data too large"), RecursionError(), MemoryError(), KeyError(3)]
)
def test_whatever_reading_raises_concerns_one_image(error: Exception) -> None:
    def read(index: int) -> tuple[bytes, str]:
        if index == 1:
            raise error
        return encoded(drawn_image(index)), f"image {index}"

    images = LabelledImages("set", np.zeros(3, np.int64), ("a",), read)
    with pytest.raises(StreamtrainError, match="image 1 of set"):
        images.decode(1)
    assert [images.decode_if_usable(index) is None for index in range(3)] == [False, True, False]
    assert type(error).__name__ in images.unusable.new_reasons()


def test_the_digest_follows_content_order_and_labels_but_not_the_folder(tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return HeldOut(*split_images(open_images(folder))).digest

    folder = class_folder(tmp_path / "images")
    first = digest(folder)
    assert digest(Path(shutil.copytree(folder, tmp_path / "copy"))) == first
    pack(folder, tmp_path / "set")
    packed = digest(tmp_path / "set")
    assert digest(Path(shutil.move(tmp_path / "set", tmp_path / "moved"))) == packed
    # as many images: one with other bytes of the same length, a renamed class, one of another class
    content = (folder / "down" / "003.png").read_bytes()
    (folder / "down" / "003.png").write_bytes(content[::-1])
    (tmp_path / "copy" / "down").rename(tmp_path / "copy" / "up")
    other = class_folder(tmp_path / "other")
    for source, target in (("across", "down"), ("down", "across")):
        (other / source / "004.png").rename(other / target / "104.png")
    assert len({first, *(digest(each) for each in (folder, tmp_path / "copy", other))}) == 4
