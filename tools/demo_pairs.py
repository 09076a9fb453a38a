"""Two views of the same drawn scene, and points of its objects in both, which are exact."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from demo_images import Drawing, draw
from PIL import Image

POINTS = 8
# the canvas is drawn larger than a view, which shows a part of it
_CANVAS = 2
# of the side of a view, between a point and its border
_MARGIN = 0.06


class Pair(NamedTuple):
    """Views uint8 [size, size, 3], and points (x, y) of each in pixels, float64 [P, 2]."""

    images: tuple[np.ndarray, np.ndarray]
    points: tuple[np.ndarray, np.ndarray]


def draw_pair(name: str, rng: np.random.Generator, size: int) -> Pair:
    """Draw a scene of the class ``name``, and two views of it.

    The second view differs by a rotation of up to 30 degrees, a zoom of up to 1.6, a shift, its exposure and its noise.
    """
    side = _CANVAS * size
    drawing = draw(name, rng, side, side)
    views = [
        _view(side, size, rng.uniform(0.65, 0.8), 0.0, rng.uniform(-0.15, 0.15, 2)),
        _view(side, size, rng.uniform(0.5, 0.65), rng.uniform(-1, 1) * np.pi / 6, rng.uniform(-0.1, 0.1, 2)),
    ]
    points = _choose_points(drawing, rng, views, size)
    return Pair(
        (_render(drawing, views[0], size), _shade(_render(drawing, views[1], size), rng)),
        (_to_view(points, views[0]), _to_view(points, views[1])),
    )


def _view(side: int, size: int, half: float, turn: float, shift: np.ndarray) -> np.ndarray:
    """Return the affine map [2, 3] from pixels of a view to the canvas; ``half`` is half its width, of the canvas's."""
    scale = half * side / size
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    centre = side / 2 * (1 + shift)
    return np.concatenate([linear, (centre - linear @ [size / 2, size / 2])[:, None]], axis=1)


def _render(drawing: Drawing, view: np.ndarray, size: int) -> np.ndarray:
    # two samples per pixel and direction, against aliasing
    fine = (view * [0.5, 0.5, 1.0]).ravel().tolist()
    image = Image.fromarray(drawing.image).transform(
        (2 * size, 2 * size), Image.Transform.AFFINE, fine, Image.Resampling.BICUBIC
    )
    return np.asarray(image.reduce(2))


def _shade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(0, rng.uniform(2, 6), (*image.shape[:2], 1))
    return np.clip(image * rng.uniform(0.75, 1.2) + noise, 0, 255).astype(np.uint8)


def _to_view(points: np.ndarray, view: np.ndarray) -> np.ndarray:
    """Map points [P, 2] of the canvas to a view."""
    return np.asarray(np.linalg.solve(view[:, :2], (points - view[:, 2]).T).T)


def _choose_points(drawing: Drawing, rng: np.random.Generator, views: list[np.ndarray], size: int) -> np.ndarray:
    """Return random points of objects, [P, 2] on the canvas, that both views show."""
    rows, columns = np.nonzero(drawing.mask)
    points = np.stack([columns, rows], -1) + 0.5
    is_shown = np.ones(len(points), bool)
    for view in views:
        inside = _to_view(points, view) / size
        is_shown &= ((inside > _MARGIN) & (inside < 1 - _MARGIN)).all(1)
    shown = points[is_shown]
    return shown[rng.permutation(len(shown))[:POINTS]]
