"""Labelled images for evaluation: a shard set with labels, or a folder of class subfolders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import SampleError
from shards.format.decode import WHITE, Color
from shards.randomness import permutation
from shards.reading.shard_set import ShardSet
from streamtrain.data.still_images import decode_image
from streamtrain.errors import StreamtrainError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
TEST_SHARE = 0.2


@dataclass(frozen=True)
class LabelledImages:
    """N images that can be read individually, from any thread.

    Attributes:
        name: of the set, for messages.
        labels: int64 [N], indices into ``classes`` if it is not empty.
        classes: the label names; may be empty.
        read: returns the encoded bytes of image i, and its name for messages.
        is_lenient: use a grey image instead of one that cannot be read or decoded.
        background: colour behind transparent images; None drops their alpha channel.
    """

    name: str
    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], tuple[bytes, str]]
    is_lenient: bool = False
    background: Color | None = WHITE

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, index: int) -> Image.Image:
        """Return image ``index`` upright, in RGB.

        Raises:
            StreamtrainError: if it cannot be decoded.
        """
        try:
            return decode_image(*self.read(index), self.background)
        except (StreamtrainError, SampleError):
            if not self.is_lenient:
                raise
            return Image.new("RGB", (64, 64), (128, 128, 128))

    def subset(self, indices: np.ndarray, name: str) -> LabelledImages:
        return replace(self, name=name, labels=self.labels[indices], read=lambda i: self.read(int(indices[i])))

    def lenient(self) -> LabelledImages:
        """Return the same images, with a grey image in place of each that cannot be read or decoded."""
        return replace(self, is_lenient=True)


def open_images(path: Path, background: Color | None = WHITE) -> LabelledImages:
    """Open a shard set, or a class folder, whose images are sorted by class and file name.

    Args:
        background: colour behind transparent images; None drops their alpha channel.

    Raises:
        StreamtrainError: if ``path`` is neither, is empty, or has no labels.
    """
    if not path.is_dir():
        raise StreamtrainError(f"{path} is not a folder: give a shard set or a folder of class subfolders")
    if (path / "manifest.json").is_file():
        shard_set = ShardSet.open(path)
        images = images_of_set(shard_set, np.arange(shard_set.num_samples))
    else:
        images = _open_folder(path)
    unlabelled = int((images.labels < 0).sum())
    if unlabelled:
        raise StreamtrainError(
            f"{unlabelled} of the {len(images)} images of {path} have no label: evaluation needs class subfolders, "
            "or shards packed from them (with .cls)"
        )
    return replace(images, background=background)


def split_images(images: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Split into train and test; which fifth is the test set depends only on the number of images.

    Raises:
        StreamtrainError: if there are too few images to split.
    """
    num_test = int(len(images) * TEST_SHARE)
    if num_test == 0:
        raise StreamtrainError(f"{images.name} has {len(images)} images, too few to split: give --test as well")
    order = permutation(0, "evaluation/split", len(images))
    test, train = np.sort(order[:num_test]), np.sort(order[num_test:])
    return images.subset(train, f"4/5 of {images.name}"), images.subset(test, f"1/5 of {images.name}")


def match_classes(train: LabelledImages, test: LabelledImages) -> LabelledImages:
    """Return ``test`` with the label numbers of ``train``, matched by class names if both sets have them.

    Raises:
        StreamtrainError: if ``test`` has a class that ``train`` lacks.
    """
    if not train.classes or not test.classes or train.classes == test.classes:
        missing = sorted(set(np.unique(test.labels).tolist()) - set(np.unique(train.labels).tolist()))
        if missing:
            raise StreamtrainError(f"{test.name} has labels that {train.name} lacks, such as {missing[0]}")
        return test
    number = {name: index for index, name in enumerate(train.classes)}
    used = [test.classes[label] for label in np.unique(test.labels)]
    unknown = [name for name in used if name not in number]
    if unknown:
        raise StreamtrainError(f"{test.name} has classes that {train.name} lacks, such as {unknown[0]!r}")
    renumber = np.array([number.get(name, -1) for name in test.classes], np.int64)
    return replace(test, labels=renumber[test.labels], classes=train.classes)


def _open_folder(path: Path) -> LabelledImages:
    classes = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        files += images
        labels += [label] * len(images)
    if not files:
        loose = any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
        what = "images but no class subfolders" if loose else "no images in class subfolders, nor a manifest.json"
        raise StreamtrainError(f"{path} has {what}: evaluation needs one subfolder per class, or a shard set")
    return LabelledImages(
        str(path),
        np.array(labels, np.int64),
        tuple(classes),
        lambda i: (files[i].read_bytes(), str(files[i])),
    )


def images_of_set(shard_set: ShardSet, indices: np.ndarray) -> LabelledImages:
    """Return a set's images at ``indices`` (int64, ascending, counted over all shards); missing labels are -1."""
    ends = np.cumsum(shard_set.sizes)
    shards = np.searchsorted(ends, indices, side="right")
    samples = indices - (ends - shard_set.sizes)[shards]
    labels = np.full(len(indices), -1, np.int64)
    for shard in np.unique(shards).tolist():
        in_shard = shards == shard
        labels[in_shard] = shard_set.records(shard)["label"][samples[in_shard]]
    path = str(shard_set.path)

    def read(index: int) -> tuple[bytes, str]:
        shard, sample = int(shards[index]), int(samples[index])
        return shard_set.read(shard, sample), f"sample {sample} of {path}/shards/{shard_set.name(shard)}"

    return LabelledImages(path, labels, shard_set.manifest.classes, read)
