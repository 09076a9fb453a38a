"""Draw the demo images: ten classes that differ only in shape and texture.

Every image shows one to three objects of its class on a background with a faint print of the same texture, so that
nearly every crop shows the class. Colours, positions, sizes, rotations, clutter, light and noise have the same
distribution in all classes, so mean colour and raw pixels carry little information: only structure separates the
classes. All images share one palette, because in a few minutes of training a network would otherwise learn to match
crops by colour. Shapes are signed distances and textures are functions of the object's coordinates, so an image can be
drawn at any size, and its mask and depth are exact. NumPy and Pillow only.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

Field = np.ndarray  # float32 [height, width]
Colour = np.ndarray  # float32 [3], in 0..1

# ---------------------------------------- shapes: signed distance, negative inside, size about 1


def disc(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - 0.9


def square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def triangle(x: Field, y: Field) -> Field:
    slope = np.sqrt(np.float32(3.0))
    return np.maximum(-y - 0.55, (slope * np.abs(x) + y) / 2 - 0.55)


def hexagon(x: Field, y: Field) -> Field:
    across = np.abs(x) * np.float32(0.866) + np.abs(y) * np.float32(0.5)
    return np.maximum(across, np.abs(y)) - 0.82


def cross(x: Field, y: Field) -> Field:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 0.95, short - 0.4)


def star(x: Field, y: Field) -> Field:
    """Five-pointed star: fold the plane into one fifth, in which the edge is a straight line from tip to notch."""
    fifth = np.float32(2 * np.pi / 5)
    angle = np.abs((np.arctan2(x, y) + fifth / 2) % fifth - fifth / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.sin(angle), radius * np.cos(angle)
    tip, notch = np.array([0.0, 1.08]), 0.5 * np.array([np.sin(fifth / 2), np.cos(fifth / 2)])
    edge = notch - tip
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    return px * np.float32(normal[0]) + (py - np.float32(tip[1])) * np.float32(normal[1])


def crescent(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x + 0.1, y) - 0.95, 0.72 - np.hypot(x - 0.42, y))


def heart(x: Field, y: Field) -> Field:
    """Two discs over a wedge whose sides are tangent to them (41 degrees from vertical)."""
    x, y = np.abs(x), y + 0.05
    lobes = np.hypot(x - 0.45, y - 0.4) - 0.52
    wedge = x * np.float32(0.751) - (y + 0.9) * np.float32(0.66)
    below = np.maximum((x - 0.45) * np.float32(0.66) + (y - 0.4) * np.float32(0.751), y - 0.4)
    return np.minimum(lobes, np.maximum(wedge, below))


def flower(x: Field, y: Field) -> Field:
    return (np.hypot(x, y) - 0.72 - 0.24 * np.cos(6 * np.arctan2(y, x))) * 0.7


def leaf(x: Field, y: Field) -> Field:
    return np.maximum(np.hypot(x - 0.6, y), np.hypot(x + 0.6, y)) - 1.15


# ------------------- textures: 0..1 in the object's coordinates; one period is about 1 unit


def _soften(wave: Field) -> Field:
    """Turn a wave around 0 into a pattern with sharp, antialiased borders."""
    return np.clip(wave * 2.5 + 0.5, 0, 1)


def stripes(u: Field, v: Field) -> Field:
    return _soften(np.sin(2 * np.pi * u))


def checks(u: Field, v: Field) -> Field:
    return _soften(1.6 * np.sin(np.pi * u) * np.sin(np.pi * v))


def dots(u: Field, v: Field) -> Field:
    row = np.floor(v)
    across, down = (u + 0.5 * (row % 2)) % 1 - 0.5, v % 1 - 0.5
    return _soften((0.38 - np.hypot(across, down)) * 3)


def bricks(u: Field, v: Field) -> Field:
    row = np.floor(v * 1.25)
    across, down = (u * 0.625 + 0.5 * (row % 2)) % 1, (v * 1.25) % 1
    joint = np.minimum(np.minimum(across, 1 - across) * 2, np.minimum(down, 1 - down))
    return _soften((joint - 0.15) * 3)


def chevrons(u: Field, v: Field) -> Field:
    return _soften(np.sin(2 * np.pi * (v + np.abs((u * 0.6) % 1 - 0.5) * 1.6)))


def rings(u: Field, v: Field) -> Field:
    return _soften(np.sin(2 * np.pi * np.hypot(u, v)))


def waves(u: Field, v: Field) -> Field:
    return _soften(np.sin(2 * np.pi * (v * 1.1 + 0.28 * np.sin(2 * np.pi * u * 0.55))))


def scales(u: Field, v: Field) -> Field:
    """Overlapping scales: each row of discs covers the lower part of the previous row."""
    row = np.floor(v * 1.3)
    nearest = np.full_like(u, 9.0)
    for step in (1, 0):
        across = (u + 0.5 * ((row + step) % 2)) % 1 - 0.5
        radius = np.hypot(across, (v * 1.3 - row - step) * 0.75)
        nearest = np.where(radius < 0.62, radius, nearest)
    return _soften((0.47 - nearest) * 4)


def rays(u: Field, v: Field) -> Field:
    return _soften(np.sin(12 * np.arctan2(v, u)))


def marble(u: Field, v: Field) -> Field:
    warp = np.sin(1.9 * u + 1.3) + np.sin(2.7 * v + 0.5) + np.sin(1.7 * (u + v))
    return _soften(np.sin(2.2 * u + 1.8 * warp) + 0.6 * np.sin(3.1 * v - 1.4 * warp))


CLASSES: dict[str, tuple[Callable[[Field, Field], Field], Callable[[Field, Field], Field]]] = {
    "striped_disc": (disc, stripes),
    "checkered_square": (square, checks),
    "dotted_triangle": (triangle, dots),
    "brick_hexagon": (hexagon, bricks),
    "chevron_cross": (cross, chevrons),
    "ringed_star": (star, rings),
    "wavy_crescent": (crescent, waves),
    "scaly_heart": (heart, scales),
    "rayed_flower": (flower, rays),
    "marbled_leaf": (leaf, marble),
}

# ---------------------------------------- drawing


def _ground_colour(rng: np.random.Generator) -> Colour:
    """Draw a greyish blue of medium lightness."""
    return np.array(
        colorsys.hsv_to_rgb(rng.normal(0.56, 0.03) % 1, rng.uniform(0.15, 0.35), rng.uniform(0.5, 0.7)), np.float32
    )


def _inks(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Draw a dark blue and a pale yellow, in random order."""
    dark = colorsys.hsv_to_rgb(rng.normal(0.62, 0.03) % 1, rng.uniform(0.3, 0.5), rng.uniform(0.15, 0.25))
    pale = colorsys.hsv_to_rgb(rng.normal(0.12, 0.02) % 1, rng.uniform(0.05, 0.2), rng.uniform(0.88, 1.0))
    inks = [np.array(ink, np.float32) for ink in (dark, pale)]
    first = int(rng.integers(2))
    return inks[first], inks[1 - first]


def _smooth_noise(rng: np.random.Generator, cells: int, width: int, height: int) -> Field:
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))


def _ground(rng: np.random.Generator, x: Field, y: Field) -> np.ndarray:
    """Draw a tilted gradient with clouds and a few plain clutter shapes: [H, W, 3]."""
    height, width = x.shape
    first, second = _ground_colour(rng), _ground_colour(rng)
    angle = rng.uniform(0, 2 * np.pi)
    blend = np.clip((x * np.cos(angle) + y * np.sin(angle)) * 0.6 + 0.5, 0, 1)
    blend = np.clip(blend + 0.35 * _smooth_noise(rng, int(rng.integers(3, 7)), width, height), 0, 1)
    image = first + blend[..., None] * (second - first)
    pixel = 2.0 / min(width, height)
    for _ in range(int(rng.integers(2, 6))):
        cx, cy, angle = rng.uniform(-1.2, 1.2), rng.uniform(-1.2, 1.2), rng.uniform(0, np.pi)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        along, across = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
        length, thickness = rng.uniform(0.05, 0.5), rng.uniform(0.02, 0.16)
        if rng.random() < 0.5:
            distance = np.hypot(along / length, across / thickness) * thickness - thickness
        else:
            distance = np.maximum(np.abs(along) - length, np.abs(across) - thickness)
        cover = np.clip(0.5 - distance / pixel, 0, 1) * rng.uniform(0.5, 1.0)
        image += cover[..., None] * (_ground_colour(rng) - image)
    return image


def _place_objects(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Draw centre and size of each object; several objects are smaller and kept apart if eight draws allow."""
    largest = {1: 0.8, 2: 0.62, 3: 0.5}[count]
    placed: list[tuple[float, float, float]] = []
    for _ in range(count):
        size = rng.uniform(0.75, 1.0) * largest
        reach = max(1.05 - size, 0.25)
        draws = rng.uniform(-reach, reach, (8, 2))
        gaps = [
            min((np.hypot(cx - px, cy - py) - size - other for px, py, other in placed), default=1.0)
            for cx, cy in draws
        ]
        best = int(np.argmax(np.asarray(gaps) > 0)) if max(gaps) > 0 else int(np.argmax(gaps))
        placed.append((float(draws[best][0]), float(draws[best][1]), float(size)))
    return placed


def _rotate(x: Field, y: Field, turn: float, stretch: float) -> tuple[Field, Field]:
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    return (x * cos + y * sin) * stretch, (y * cos - x * sin) / stretch


class Drawing(NamedTuple):
    """An image uint8 [height, width, 3] with its maps [height, width].

    The mask, uint8, has 0 for the background and 1 + the number of the class for its objects. Depth, uint16 in
    millimetres, follows from the sizes of the objects, as if all were equally large: 1 m / size; the background is a
    wall at ``WALL``.
    """

    image: np.ndarray
    mask: np.ndarray
    depth: np.ndarray


WALL = 4000


def draw(name: str, rng: np.random.Generator, width: int, height: int) -> Drawing:
    """Draw one image of the class ``name``, with its mask and its depth."""
    shape, texture = CLASSES[name]
    half = min(width, height) / 2
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = (columns + 0.5 - width / 2) / np.float32(half), (rows + 0.5 - height / 2) / np.float32(half)
    image = _ground(rng, x, y)
    light = rng.uniform(0, 2 * np.pi)
    fills = _inks(rng)
    # texture period in image coordinates: the same scale in all classes
    period = rng.uniform(0.3, 0.42)
    # print the texture on the background: a crop without the object still shows the class
    u, v = _rotate(x, y, rng.uniform(0, 2 * np.pi), 1.0)
    offset = rng.uniform(-9, 9, 2)
    printed = texture(u / period + offset[0], v / period + offset[1]) - 0.5
    image += (rng.uniform(0.3, 0.5) * printed)[..., None]
    mask, depth = np.zeros((height, width), np.uint8), np.full((height, width), WALL, np.uint16)
    for cx, cy, size in _place_objects(rng, int(rng.choice([1, 2, 3], p=[0.45, 0.35, 0.2]))):
        turn, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.15)
        shadow_u, shadow_v = _rotate(x - cx + 0.05 * np.cos(light), y - cy + 0.05 * np.sin(light), turn, stretch)
        shadow = np.clip(0.5 - shape(shadow_u / size, shadow_v / size) * size / 0.12, 0, 1)
        image *= (1 - 0.45 * shadow)[..., None]
        u, v = _rotate(x - cx, y - cy, turn, stretch)
        distance = shape(u / size, v / size) * size
        shift = rng.uniform(-0.5, 0.5, 2) if texture is not rays else (0.0, 0.0)
        pattern = texture(u / period + shift[0], v / period + shift[1])
        fill = fills[0] + pattern[..., None] * (fills[1] - fills[0])
        # shading: brighter towards the light, darker along the edge
        shade = 1 + 0.18 * (((x - cx) * np.cos(light) + (y - cy) * np.sin(light)) / size)
        shade = shade * (0.72 + 0.28 * np.clip(-distance / 0.05, 0, 1))
        cover = np.clip(0.5 - distance * half, 0, 1)
        image += cover[..., None] * (fill * shade[..., None] - image)
        mask[distance <= 0] = 1 + list(CLASSES).index(name)
        depth[distance <= 0] = round(1000 / size)
    exposure = rng.uniform(0.85, 1.15)
    noise = rng.normal(0, rng.uniform(0.005, 0.03), (height, width, 1)).astype(np.float32)
    grain = rng.normal(0, 0.01, image.shape).astype(np.float32)
    pixels = (np.clip(image * exposure + noise + grain, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Drawing(pixels, mask, depth)
