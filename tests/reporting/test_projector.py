from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from streamtrain.reporting.projector import write_features


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
        assert np.array_equal(sprite[8:16, 8:16], thumbnails[4])
    # a new run in the same folder replaces the first features
    write_features(tmp_path, 10, features[20], ["x"] * 5, thumbnails)
    assert np.allclose(np.loadtxt(tmp_path / shown[1].tensor_path), features[20], rtol=1e-4)
    assert [entry.tensor_name for entry in entries_in(tmp_path)] == ["first, step 10"]
    # torn by a crash
    (tmp_path / "projector_config.pbtxt").write_text("")
    write_features(tmp_path, 40, features[30], ["x"] * 5, thumbnails)
    assert [entry.tensor_name for entry in entries_in(tmp_path)] == ["first, step 40"]
