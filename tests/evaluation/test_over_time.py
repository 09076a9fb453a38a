from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from streamtrain.evaluation.over_time import COLUMNS, SIZE, MapsOverTime


def features(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(4, 4, 8, generator=generator), dim=-1) for _ in range(2)]


def images() -> list[np.ndarray]:
    return [np.full((16, 16, 3), value, np.uint8) for value in (40, 200)]


def columns(page: np.ndarray) -> int:
    return round((page.shape[1] - 48 + 14) / (SIZE[0] + 14)) - 1


def test_first_and_latest_maps_are_kept_with_others_between(tmp_path: Path) -> None:
    maps = MapsOverTime(images(), tmp_path / "maps.npz", 0)
    for step in range(0, 100, 10):
        maps.add(step, features(step))
    steps = np.load(tmp_path / "maps.npz")["steps"].tolist()
    assert len(steps) == COLUMNS and steps[0] == 0 and steps[-1] == 90 and steps == sorted(steps)
    assert max(np.diff(steps)) <= 40
    for page in (maps.components_page(), maps.similarity_page()):
        assert page.dtype == np.uint8 and columns(page) == COLUMNS


def test_a_resumed_run_keeps_earlier_maps(tmp_path: Path) -> None:
    path = tmp_path / "maps.npz"
    straight, first = MapsOverTime(images(), tmp_path / "other.npz", 0), MapsOverTime(images(), path, 0)
    for step in (0, 10, 20):
        straight.add(step, features(step))
        first.add(step, features(step))
    first.add(25, features(99))
    resumed = MapsOverTime(images(), path, 20)
    for maps in (straight, resumed):
        maps.add(30, features(30))
    assert np.array_equal(resumed.components_page(), straight.components_page())
    assert np.array_equal(resumed.similarity_page(), straight.similarity_page())
    # a damaged file is ignored
    path.write_bytes(path.read_bytes()[:50])
    again = MapsOverTime(images(), path, 30)
    again.add(40, features(40))
    assert np.load(path)["steps"].tolist() == [40]


def test_maps_of_another_size_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "maps.npz"
    MapsOverTime(images(), path, 0).add(0, features(0))
    resumed = MapsOverTime(images(), path, 10)
    resumed.add(10, [each.repeat(2, 2, 1) for each in features(1)])
    assert np.load(path)["steps"].tolist() == [10]


def test_damaged_files_of_maps_count_as_none(tmp_path: Path) -> None:
    path = tmp_path / "maps.npz"
    MapsOverTime(images(), path, 0).add(5, features(0))
    good = path.read_bytes()
    arrays = dict(np.load(path))
    np.savez(tmp_path / "other.npz", **{**arrays, "steps": [1, 2, 3]})
    flat = tmp_path / "flat.npz"
    np.savez(flat, **{**arrays, "components": np.zeros((1, 2, 4, 4), np.uint8)})
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, **{**arrays, "similarity": np.zeros((1, 2, 6000, 6000))})
    for content in (b"", good[:100], good[:-50], *(path.read_bytes() for path in (tmp_path / "other.npz", flat, bomb))):
        path.write_bytes(content)
        maps = MapsOverTime(images(), path, 10)
        maps.add(6, features(1))
        assert np.load(path)["steps"].tolist() == [6]
