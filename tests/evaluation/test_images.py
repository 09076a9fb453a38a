"""Evaluation takes the same images and labels from a folder as from the set that is packed from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_images import draw_folder, drawn_image, encoded

from shards.errors import ShardError
from shards.format.pixels import RGB
from shards.format.set_manifest import SetManifest
from shards.packing.inputs import list_images
from shards.packing.pack import pack
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.images import open_images, open_source


def test_evaluation_takes_the_images_that_packing_takes(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "images", 9, ("cat", "dog", "eel"))
    for name in ("cat/._000.jpg", "cat/notes.txt", "dog/.checkpoints/copy.jpg", ".trash/a.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"stray")
    (folder / "cat" / "drawing.gif").write_bytes(encoded(drawn_image(7), "GIF"))
    pack(folder, tmp_path / "set")
    packed, found = open_images(tmp_path / "set"), open_images(folder)
    assert found.labels.tolist() == packed.labels.tolist() and found.classes == packed.classes
    names = [item.name for item in list_images(folder).items]
    assert [found.read(index)[1] for index in range(len(found))] == [str(folder / name) for name in names]


def test_evaluation_of_a_single_class_can_be_matched(tmp_path: Path) -> None:
    found = open_images(draw_folder(tmp_path / "images", 3, ("cat",)))
    assert (found.labels.tolist(), found.classes) == ([0, 0, 0], ("cat",))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    folder = draw_folder(tmp_path / "images", 4, ("cat", "dog"))
    found = open_images(folder)
    (folder / "cat" / "image 000.jpg").unlink()
    with pytest.raises(StreamtrainError, match=r"cat/image 000\.jpg cannot be read \(No such file or directory\)"):
        found.decode(0)


def test_a_set_without_images_is_an_error_in_one_line(tmp_path: Path) -> None:
    SetManifest(()).save(tmp_path)
    with pytest.raises(ShardError, match="has no images; pack a set of images"):
        open_source(str(tmp_path), None, RGB)
