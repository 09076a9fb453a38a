"""Mutual nearest patches, and points found by interpolated features, against direct computations in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from streamtrain.evaluation import matching
from streamtrain.evaluation.matching import PointFinder, mutual_matches


def random_features(seed: int, *grid: int) -> torch.Tensor:
    return F.normalize(torch.randn(*grid, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("block", [1, 2**24])
def test_mutual_matches_equal_numpy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_BLOCK", block)
    first, second = random_features(0, 5, 7), random_features(1, 4, 6)
    similarity = first.flatten(0, 1).numpy() @ second.flatten(0, 1).numpy().T
    expected = [
        (similarity[i, j], divmod(i, 7), divmod(j, 6))
        for i, j in enumerate(similarity.argmax(1).tolist())
        if similarity[:, j].argmax() == i
    ]
    expected.sort(reverse=True)
    found = mutual_matches(first, second)
    assert len(found) == len(expected) > 5
    np.testing.assert_allclose(found.similarity, [value for value, _, _ in expected], rtol=1e-5)
    assert found.first.tolist() == [list(cell) for _, cell, _ in expected]
    assert found.second.tolist() == [list(cell) for _, _, cell in expected]
    best = mutual_matches(first, second, 3)
    assert len(best) == 3 and np.array_equal(best.second, found.second[:3])
    masks = [np.zeros((5, 7), bool), np.ones((4, 6), bool)]
    masks[0][tuple(found.first[4])] = True
    assert mutual_matches(first, second, 3, masks).second.tolist() == [found.second[4].tolist()]


def interpolate(features: np.ndarray, x: float, y: float) -> np.ndarray:
    """Return the bilinear interpolation at a point in units of patches, constant beyond the outermost centres."""
    height, width, _ = features.shape
    column, row = np.clip(x - 0.5, 0, width - 1), np.clip(y - 0.5, 0, height - 1)
    left, top = min(int(column), width - 2), min(int(row), height - 2)
    across, down = column - left, row - top
    corners = features[top : top + 2, left : left + 2]
    upper, lower = (corner[0] * (1 - across) + corner[1] * across for corner in corners)
    return upper * (1 - down) + lower * down


@pytest.mark.parametrize("block", [1, 2**24])
def test_points_equal_numpy(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_BLOCK", block)
    patch, first, second = 4, random_features(2, 3, 5), random_features(3, 4, 3)
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(4))
    queries = PointFinder(first, patch).at(points)
    found = PointFinder(second, patch).find(queries)
    for point, query, at in zip(points.tolist(), queries, found, strict=True):
        expected = interpolate(first.numpy(), point[0] * 5, point[1] * 3)
        np.testing.assert_allclose(query.numpy(), expected, atol=1e-5)
        values = np.zeros((4 * patch, 3 * patch))
        for y, x in np.ndindex(values.shape):
            pixel = interpolate(second.numpy(), (x + 0.5) / patch, (y + 0.5) / patch)
            values[y, x] = pixel @ expected / np.linalg.norm(pixel)
        x, y = (at.numpy() * (3 * patch, 4 * patch) - 0.5).round().astype(int)
        assert values[y, x] == pytest.approx(values.max(), abs=1e-5)


def test_points_of_the_same_or_shifted_features_are_exact() -> None:
    patch, features = 8, random_features(5, 6, 9)
    rows, columns = np.mgrid[4:44, 4:68]
    # pixel centres between the outermost patch centres
    points = torch.from_numpy(np.stack([(columns + 0.5) / 72, (rows + 0.5) / 48], -1).reshape(-1, 2)).float()
    finder = PointFinder(features, patch)
    torch.testing.assert_close(finder.find(finder.at(points)), points, atol=1e-5, rtol=0)
    shifted = PointFinder(features.roll((1, -2), (0, 1)), patch)
    inside = points[(points[:, 0] * 72 > 20.4) & (points[:, 1] * 48 < 36)]
    moved = inside + torch.tensor([-2 * patch / 72, patch / 48])
    torch.testing.assert_close(shifted.find(finder.at(inside)), moved, atol=1e-5, rtol=0)
