from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from streamtrain.reporting.projector import frame_by_label, write_features


def entries_in(folder: Path) -> list[Any]:
    return list(text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig()).embeddings)


def test_first_and_latest_features_are_both_shown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    features = {step: rng.normal(size=(5, 3)) for step in (10, 20, 30)}
    for step, values in features.items():
        write_features(tmp_path, step, values, ["a", "b\tc", "a", "a", "a"], thumbnails)
    shown = entries_in(tmp_path)
    assert [entry.tensor_name.rpartition(" ")[2] for entry in shown] == ["30", "10"]
    for entry, step in zip(shown, (30, 10), strict=True):
        np.testing.assert_allclose(np.loadtxt(tmp_path / entry.tensor_path), features[step], rtol=1e-4)
        assert (tmp_path / entry.metadata_path).read_text().splitlines() == ["a", "b c", "a", "a", "a"]
        sprite = np.asarray(Image.open(tmp_path / entry.sprite.image_path))
        assert sprite.shape == (24, 24, 3) and list(entry.sprite.single_image_dim) == [8, 8]
        # the fifth thumbnail, inside its frame
        assert np.array_equal(sprite[9:15, 9:15], thumbnails[4][1:7, 1:7])
    # a new run in the same folder replaces the first features
    write_features(tmp_path, 10, features[20], ["x"] * 5, thumbnails)
    assert np.allclose(np.loadtxt(tmp_path / shown[1].tensor_path), features[20], rtol=1e-4)
    assert [entry.tensor_name for entry in entries_in(tmp_path)] == ["start, step 10"]
    # torn by a crash
    (tmp_path / "projector_config.pbtxt").write_text("")
    write_features(tmp_path, 40, features[30], ["x"] * 5, thumbnails)
    assert [entry.tensor_name for entry in entries_in(tmp_path)] == ["start, step 40"]


def test_the_projector_opens_the_latest_features(tmp_path: Path) -> None:
    thumbnails = np.zeros((2, 8, 8, 3), np.uint8)
    # written by an earlier version
    (tmp_path / "projector_config.pbtxt").write_text('embeddings {\n  tensor_name: "first, step 10"\n}\n')
    write_features(tmp_path, 20, np.zeros((2, 3)), ["a", "b"], thumbnails)
    names = [entry.tensor_name for entry in entries_in(tmp_path)]
    # the page sorts by name
    assert names == ["latest, step 20", "start, step 10"] == sorted(names)


def test_frames_have_the_colour_of_the_label() -> None:
    labels = [str(index % 20) for index in range(40)]
    framed = frame_by_label(np.full((40, 32, 32, 3), 7, np.uint8), labels)
    corners = [tuple(each[0, 0].tolist()) for each in framed]
    assert corners[:20] == corners[20:] and len(set(corners)) == 20
    inner = framed[:, 3:-3, 3:-3]
    assert (inner == 7).all() and all((each[0] == each[0, 0]).all() for each in framed)
