"""Images for evaluation and ``streamtrain embed``: of a shard set, folder, list or archive, labelled or not."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from shards.errors import SampleError, ShardError
from shards.format.decode import WHITE, Color
from shards.format.imagery import require_extra
from shards.format.pixels import RGB, PixelFormat
from shards.packing.inputs import list_images, list_inputs, needs_unpacking
from shards.packing.items import Inputs, SourceUnreachable
from shards.randomness import permutation
from shards.reading.set_maps import SetMaps
from shards.reading.shard_set import DAMAGED_LABEL, ShardSet
from shards.storage.store import is_url
from streamtrain.data.still_images import Still, decode_image
from streamtrain.errors import StreamtrainError

TEST_SHARE = 0.2
# of the images that a warning names
_NUM_SHOWN = 3


class UnusableImages:
    """Collects why images of a set could not be read or decoded. Thread-safe."""

    def __init__(self) -> None:
        # a dict keeps the order and removes repetitions
        self._reasons: dict[str, None] = {}
        self._num_reported = 0

    def add(self, reason: str) -> None:
        self._reasons.setdefault(reason)

    def new_reasons(self) -> str:
        """Return the reasons added since the last call: the first few and a count of the others; empty if none."""
        # sorted, because threads add them in any order
        new = sorted(list(self._reasons)[self._num_reported :])
        self._num_reported += len(new)
        more = f"; and {len(new) - _NUM_SHOWN} more" if len(new) > _NUM_SHOWN else ""
        return "; ".join(new[:_NUM_SHOWN]) + more


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedMaps:
    """The maps in a shard set of N of its images.

    Attributes:
        by_kind: the maps of each kind.
        shards, samples: of the images, int64 [N].
        name: of the set, for messages.
    """

    by_kind: Mapping[str, SetMaps]
    shards: np.ndarray
    samples: np.ndarray
    name: str

    def subset(self, indices: np.ndarray) -> PackedMaps:
        return replace(self, shards=self.shards[indices], samples=self.samples[indices])

    def exist(self, kind: str) -> np.ndarray:
        """Return which images have a map of a kind, bool [N]; raises ShardError."""
        found = np.zeros(len(self.shards), bool)
        if (maps := self.by_kind.get(kind)) is not None:
            for shard in np.unique(self.shards).tolist():
                rows = self.shards == shard
                found[rows] = maps.exist(shard, self.samples[rows])
        return found

    def read(self, kind: str, index: int) -> tuple[bytes, str]:
        """Return the encoded bytes of the map of image ``index``, and its name for messages; raises ShardError."""
        shard, sample = int(self.shards[index]), int(self.samples[index])
        return self.by_kind[kind].read(
            shard, sample
        ), f"the {kind} map of sample {sample} of {self.name}, shard {shard}"


@dataclass(frozen=True)
class LabelledImages:
    """N images that can be read individually, from any thread.

    Attributes:
        name: of the set, for messages.
        labels: int64 [N], indices into ``classes`` if it is not empty.
        classes: the label names; may be empty.
        read: returns the encoded bytes of image i, and its name for messages.
        unusable: the images that could not be decoded so far; shared by all subsets.
        background: colour behind transparent images; None drops their alpha channel.
        pixels: channels and dtype of the decoded images.
        identify: returns text that changes with the content or the order of the images; None for a subset.
        key: returns text that changes with the content of image i, but not with the folder of the set.
        sample_key: returns the key of image i in its set, or its path relative to its folder.
        maps: of class ids or depth that were packed with the images; None without any.
        stops_if_unreachable: a shard or source that cannot be reached is an error, not an unusable image.
    """

    name: str
    labels: np.ndarray
    classes: tuple[str, ...]
    read: Callable[[int], tuple[bytes, str]]
    unusable: UnusableImages = field(default_factory=UnusableImages)
    background: Color | None = WHITE
    pixels: PixelFormat = RGB
    identify: Callable[[], str] | None = None
    key: Callable[[int], str] = str
    sample_key: Callable[[int], str] = str
    maps: PackedMaps | None = None
    stops_if_unreachable: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def require_pixels(self, pixels: PixelFormat) -> None:
        """Raise StreamtrainError if the images have other channels or another dtype than a network takes."""
        if self.pixels != pixels:
            raise StreamtrainError(
                f"{self.name} has images of {self.pixels}, the network takes {pixels}; pack a set with --channels "
                f"{pixels.channels} --dtype {pixels.dtype}"
            )

    def decode(self, index: int) -> Still:
        """Return image ``index`` upright.

        Raises:
            StreamtrainError: if it cannot be read or decoded.
            ShardError: with ``stops_if_unreachable``, if the shard or the source of the image cannot be reached.
        """
        name = f"image {index} of {self.name}"
        try:
            content, name = self.read(index)
            return decode_image(content, name, self.background, self.pixels)
        except Exception as error:
            if self.stops_if_unreachable and isinstance(error, ShardError) and not isinstance(error, SampleError):
                raise
            # an unforeseen exception of a decoder costs only this image
            is_explained = isinstance(error, StreamtrainError | ShardError)
            reason = str(error) if is_explained else f"cannot read the image {name}: {type(error).__name__}: {error}"
            raise StreamtrainError(reason) from None

    def decode_if_usable(self, index: int) -> Still | None:
        """Return image ``index`` like ``decode``; None, and an entry in ``unusable``, if it cannot be decoded."""
        try:
            return self.decode(index)
        except StreamtrainError as error:
            self.unusable.add(str(error))
            return None

    def subset(self, indices: np.ndarray, name: str) -> LabelledImages:
        return replace(
            self, name=name, labels=self.labels[indices], read=lambda i: self.read(int(indices[i])), identify=None,
            key=lambda i: self.key(int(indices[i])), sample_key=lambda i: self.sample_key(int(indices[i])),
            maps=self.maps and self.maps.subset(indices),
        )  # fmt: skip

    def digest(self) -> str:
        """Return text that changes with the images, their order, labels or background, but not with their folder.

        Images of a folder are read.
        """
        digest = hashlib.sha256(repr((self.classes, self.background)).encode(errors="surrogateescape"))
        digest.update(self.labels.astype("<i8").tobytes())
        for index in range(len(self)):
            digest.update(f"\n{self.key(index)}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def class_name(self, label: int) -> str:
        """Return the name of a label, or its number if it has none."""
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)


def open_images(path: Path, background: Color | None = WHITE, pixels: PixelFormat = RGB) -> LabelledImages:
    """Open a labelled shard set, or a folder of class subfolders, whose images are sorted by class and file name.

    Args:
        background: colour behind transparent images; None drops their alpha channel.
        pixels: channels and dtype that images of a folder must have; a set states its own.

    Raises:
        ShardError, StreamtrainError: if ``path`` is neither, cannot be read, is empty, or has no labels.
    """
    if not path.is_dir():
        raise StreamtrainError(f"{path} is not a folder: give a shard set or a folder of images")
    if (path / "manifest.json").is_file():
        images = open_source(str(path), background, pixels)
    else:
        try:
            images = replace(_open_class_folder(path, pixels), background=background)
        except OSError as error:
            raise StreamtrainError(f"{error.filename or path} cannot be read ({error.strerror})") from None
    if unlabelled := int((images.labels < 0).sum()):
        raise StreamtrainError(
            f"{unlabelled} of the {len(images)} images of {path} have no label: evaluation needs class subfolders, "
            "or shards packed from them (with .cls)"
        )
    return images


def split_images(images: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Split into train and test; which fifth is the test set depends only on the number of images.

    Raises:
        StreamtrainError: if there are too few images to split.
    """
    train, test = split_indices(images)[0]
    return images.subset(train, f"4/5 of {images.name}"), images.subset(test, f"1/5 of {images.name}")


def split_indices(images: LabelledImages) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return five splits into ascending indices of train and test, so that every image is tested once.

    The first one is that of ``split_images``.

    Raises:
        StreamtrainError: if there are too few images to split.
    """
    num_test, num_splits = int(len(images) * TEST_SHARE), round(1 / TEST_SHARE)
    if num_test == 0:
        raise StreamtrainError(f"{images.name} has {len(images)} images, too few to split: give --test as well")
    order = permutation(0, "evaluation/split", len(images))
    # the first has the length that it always had; up to four images are left for the last
    ends = [num_test * (number + 1) for number in range(num_splits - 1)] + [len(images)]
    splits, start = [], 0
    for end in ends:
        splits.append((np.sort(np.concatenate([order[:start], order[end:]])), np.sort(order[start:end])))
        start = end
    return splits


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


def open_source(source: str, background: Color | None, pixels: PixelFormat) -> LabelledImages:
    """Open a shard set, or any source that ``streamtrain pack`` reads without unpacking it; missing labels are -1.

    Args:
        source: path, or URL of a set.
        background, pixels: as ``open_images``.

    Raises:
        ShardError: the source cannot be read, or has no images.
    """
    if is_url(source) or (Path(source) / "manifest.json").is_file():
        shard_set = ShardSet.open(source)
        images = images_of_set(shard_set, np.arange(shard_set.num_samples))
        if not len(images):
            raise ShardError(f"{source} has no images; pack a set of images")
    elif needs_unpacking(source):
        raise ShardError(f"{source} is compressed: unpack it, or pack a set of it")
    else:
        try:
            inputs = list_inputs(source, pixels=pixels)
        except ShardError as error:
            raise ShardError(str(error).removeprefix("--src ")) from None
        images = _images_of_inputs(Path(source), inputs, pixels)
    return replace(images, background=background)


def _open_class_folder(path: Path, pixels: PixelFormat) -> LabelledImages:
    """Return the images that ``streamtrain pack`` would take from a folder, with the same labels."""
    inputs = list_images(path, pixels)
    labels, classes = np.array([item.label for item in inputs.items], np.int64), inputs.classes
    top = {item.name.rpartition("/")[0].partition("/")[0] for item in inputs.items}
    if not classes and len(top) == 1 and "" not in top:
        # a single class has no label in a set, but can be tested against a set of several
        labels, classes = np.zeros_like(labels), tuple(top)
    if not classes:
        missing = "no images in class subfolders, nor a manifest.json"
        what = "images but no class subfolders" if inputs.items else missing
        needs = "evaluation needs one subfolder per class, or a shard set"
        raise StreamtrainError(f"{path} has {what}: {needs}{inputs.passed_over.clauses()}")
    return replace(_images_of_inputs(path, inputs, pixels), labels=labels, classes=classes)


def _images_of_inputs(path: Path, inputs: Inputs, pixels: PixelFormat) -> LabelledImages:
    """Return the listed images of ``path``, a folder, a list or an archive."""
    for line in inputs.passed_over.lines():
        logger.info("%s: %s", path, line)

    def read(index: int) -> tuple[bytes, str]:
        item = inputs.items[index]
        name = str(path / item.name)
        try:
            return item.location.read(), name
        except SourceUnreachable:
            raise
        except ShardError as error:
            raise StreamtrainError(f"{name} cannot be read ({error})") from error

    def key(index: int) -> str:
        item = inputs.items[index]
        try:
            return hashlib.sha256(item.location.read()).hexdigest()
        except ShardError:
            return item.name

    def identify() -> str:
        digest = hashlib.sha256(inputs.fingerprint(str(path.resolve())).encode())
        for file in dict.fromkeys(getattr(item.location, "path", path) for item in inputs.items):
            status = file.stat() if file.exists() else None
            stated = status and (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            digest.update(f"\n{stated}".encode())
        return digest.hexdigest()

    labels = np.array([item.label for item in inputs.items], np.int64)
    return LabelledImages(
        str(path), labels, inputs.classes, read, pixels=pixels, identify=identify, key=key,
        sample_key=lambda index: inputs.items[index].name,
    )  # fmt: skip


def images_of_set(shard_set: ShardSet, indices: np.ndarray) -> LabelledImages:
    """Return a set's images at ``indices`` (int64, ascending, counted over all shards); missing labels are -1.

    Images whose label in the index is damaged are left out, with a warning. Raises ShardError without an extra that
    decodes the images.
    """
    if not shard_set.pixels.is_rgb:
        require_extra()
    ends = np.cumsum(shard_set.sizes)
    shards = np.searchsorted(ends, indices, side="right")
    samples = indices - (ends - shard_set.sizes)[shards]
    labels = np.full(len(indices), -1, np.int64)
    for shard in np.unique(shards).tolist():
        in_shard = shards == shard
        labels[in_shard] = shard_set.labels(shard, samples[in_shard])
    path = str(shard_set.path)
    is_sound = labels != DAMAGED_LABEL
    if not is_sound.all():
        logger.warning("%s: %d images have damaged labels and are left out", path, int((~is_sound).sum()))
        labels, shards, samples = labels[is_sound], shards[is_sound], samples[is_sound]

    def read(index: int) -> tuple[bytes, str]:
        shard, sample = int(shards[index]), int(samples[index])
        return shard_set.read(shard, sample), f"sample {sample} of {path}/shards/{shard_set.name(shard)}"

    def identify() -> str:
        where = np.stack([shards, samples]).astype(np.int64).tobytes()
        return hashlib.sha256(shard_set.digest.encode() + where).hexdigest()

    def key(index: int) -> str:
        return f"{shard_set.digest}\t{shards[index]}\t{samples[index]}"

    by_kind = {kind: SetMaps(shard_set, kind) for kind in shard_set.manifest.maps}
    maps = PackedMaps(by_kind, shards, samples, path) if by_kind else None
    return LabelledImages(
        path, labels, shard_set.manifest.classes, read, pixels=shard_set.pixels, identify=identify, key=key,
        sample_key=lambda index: shard_set.key(int(shards[index]), int(samples[index])), maps=maps,
    )  # fmt: skip
