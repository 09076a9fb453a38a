"""Cached features: found again for the same images, network and preprocessing, and for nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import packed_set
from tiny_backbone import class_folder, tiny_backbone
from torch import Tensor

from streamtrain.evaluation import feature_cache
from streamtrain.evaluation.feature_cache import cached_features, feature_key, store_features
from streamtrain.evaluation.images import LabelledImages, images_of_set, open_images, split_images
from streamtrain.model.vit import VisionTransformer

SETTINGS = {"size": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "streamtrain" / "features"


def numbers(images: LabelledImages) -> tuple[Tensor, Tensor]:
    return torch.randn(len(images), 3), torch.ones(len(images), dtype=torch.bool)


def lookup(images: LabelledImages, **options: object) -> tuple[Tensor, bool]:
    features, _, is_cached = cached_features(images, None, {**SETTINGS, **options}, numbers)
    return features, is_cached


def test_features_are_found_again_and_private(tmp_path: Path, cache: Path) -> None:
    folder = class_folder(tmp_path / "images")
    features, is_cached = lookup(open_images(folder))
    assert not is_cached
    again, is_cached = lookup(open_images(folder))
    assert is_cached and torch.equal(features, again)
    assert os.stat(cache).st_mode & 0o077 == 0 and len(list(cache.iterdir())) == 1
    assert not lookup(open_images(folder), size=16)[1]
    assert not cached_features(open_images(folder), None, SETTINGS, numbers, is_used=False)[2]


def test_changed_images_are_computed_again(tmp_path: Path) -> None:
    folder = class_folder(tmp_path / "images")
    lookup(open_images(folder))
    path = folder / "down" / "003.png"
    status, content = path.stat(), path.read_bytes()
    # as many bytes, at the same time of modification
    path.write_bytes(content[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not lookup(open_images(folder))[1]
    path.rename(folder / "down" / "103.png")
    assert not lookup(open_images(folder))[1]
    assert lookup(open_images(folder))[1]
    (folder / "down" / "103.png").unlink()
    assert not lookup(open_images(folder))[1]


def test_a_shard_set_is_known_by_its_content(tmp_path: Path) -> None:
    first, second = (packed_set(tmp_path / name, count, ("x", "y")) for name, count in (("a", 12), ("b", 14)))
    every = np.arange(12)
    features, _ = lookup(images_of_set(first, every))
    again, is_cached = lookup(images_of_set(first, every))
    assert is_cached and torch.equal(features, again)
    assert not lookup(images_of_set(second, every))[1]
    assert not lookup(images_of_set(first, every[::-1]))[1]
    # a part of a set has no identity of its own
    assert split_images(images_of_set(first, every))[0].identify is None


def test_every_weight_and_setting_changes_the_key(tmp_path: Path) -> None:
    images, model = open_images(class_folder(tmp_path / "images")), tiny_backbone().model
    key = feature_key(images, model, SETTINGS)
    assert key is not None and key == feature_key(images, tiny_backbone().model, SETTINGS)
    assert key != feature_key(images, model, {**SETTINGS, "mean": 0.5}) != feature_key(images, None, SETTINGS)
    next(model.parameters()).data.view(-1)[0] += 1e-6
    assert key != feature_key(images, model, SETTINGS)
    half = tiny_backbone().model.to(torch.bfloat16)
    assert key != feature_key(images, half, SETTINGS)

    class Another(VisionTransformer):
        pass

    model.__class__ = Another
    assert feature_key(images, model, SETTINGS) is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "folder"])
def test_a_damaged_file_is_computed_and_written_again(damage: str, tmp_path: Path, cache: Path) -> None:
    folder = class_folder(tmp_path / "images")
    lookup(open_images(folder))
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"truncated": bytes(content[:-9]), "flipped": bytes(content)}.get(damage, b""))
    if damage == "folder":
        path.unlink()
        path.mkdir()
    features, is_cached = lookup(open_images(folder))
    assert not is_cached
    if damage != "folder":
        again, is_cached = lookup(open_images(folder))
        assert is_cached and torch.equal(features, again)


@pytest.mark.parametrize("obstacle", ["a file", "a link", "no home"])
def test_without_a_folder_features_are_computed(obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = class_folder(tmp_path / "images")
    if obstacle == "a file":
        (tmp_path / "cache").write_text("")
    elif obstacle == "a link":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "streamtrain").symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "$NOT_SET/cache")
    assert [lookup(open_images(folder))[1] for _ in range(2)] == [False, False]
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_no_error(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "write_whole", fail)
    images = open_images(class_folder(tmp_path / "images"))
    assert [lookup(images)[1] for _ in range(2)] == [False, False] and not list(cache.iterdir())


def test_features_of_unusable_images_are_not_kept(tmp_path: Path) -> None:
    def compute(images: LabelledImages) -> tuple[Tensor, Tensor]:
        features, is_usable = numbers(images)
        is_usable[3] = False
        return features, is_usable

    images = open_images(class_folder(tmp_path / "images"))
    for _ in range(2):
        _, is_usable, is_cached = cached_features(images, None, SETTINGS, compute)
        assert not is_cached and not is_usable[3]


def test_the_oldest_files_make_room(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "MAX_BYTES", 20_000)
    for number in range(3):
        store_features(f"{number}", torch.zeros(1000, 1))
        os.utime(cache / f"{number}.safetensors", (number, number))
    assert feature_cache.load_features("0", 1000) is not None, "used last"
    store_features("3", torch.zeros(1000, 1))
    store_features("4", torch.zeros(1000, 1))
    assert {path.stem for path in cache.iterdir()} == {"0", "3", "4"}
    # larger than the limit
    store_features("5", torch.zeros(6000, 1))
    assert {path.stem for path in cache.iterdir()} == {"0", "3", "4"}
