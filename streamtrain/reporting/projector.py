"""Files of TensorBoard's embedding projector, for the first and the latest features of a run.

The projector opens the features whose name is the first of the alphabet, and without colours; therefore the names
below, and a frame in the colour of its label around each thumbnail.

``SummaryWriter.add_embedding`` adds a folder at each call, which fills the disk in a long run, and drops the earlier
entries when a run is resumed.
"""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shards.errors import printable
from shards.format.files import write_whole

CONFIG_NAME = "projector_config.pbtxt"
_ENTRY = """embeddings {{
  tensor_name: "{title}, step {step}"
  tensor_path: "projector/{name}.tsv"
  metadata_path: "projector/{name}-labels.tsv"
  sprite {{
    image_path: "projector/{name}.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
"""
# names of the features in the projector
_TITLES = {"first": "start", "latest": "latest"}
# width of a frame, as a share of the thumbnail's side
_FRAME = 0.1


def write_features(
    folder: Path, step: int, features: np.ndarray, labels: Sequence[str], thumbnails: np.ndarray
) -> None:
    """Write features float [N, D] with labels and thumbnails uint8 [N, side, side, 3]; the latest ones are replaced.

    ``folder`` is the folder of the event files. Raises OSError.
    """
    path, config = folder / "projector", folder / CONFIG_NAME
    path.mkdir(exist_ok=True)
    # earlier versions wrote first instead of start
    written = re.search(rb'"(?:first|start), step (\d{1,15})"', config.read_bytes()) if config.exists() else None
    steps = {"first": step}
    if written and int(written[1]) < step:
        steps = {"latest": step, "first": int(written[1])}
    name = next(iter(steps))
    columns = math.ceil(math.sqrt(len(thumbnails)))
    side = thumbnails.shape[1]
    # the projector expects a square grid of square images
    sprite = np.zeros((columns * side, columns * side, 3), np.uint8)
    for index, thumbnail in enumerate(frame_by_label(thumbnails, labels)):
        top, left = index // columns * side, index % columns * side
        sprite[top : top + side, left : left + side] = thumbnail
    Image.fromarray(sprite).save(path / f"{name}.png")
    rows = ("\t".join(f"{value:.5g}" for value in row) for row in features)
    (path / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    # the file has a line for each label
    lines = "".join(printable(label.replace("\t", " ")) + "\n" for label in labels)
    (path / f"{name}-labels.tsv").write_text(lines, encoding="utf-8")
    entries = (_ENTRY.format(name=each, title=_TITLES[each], step=at, side=side) for each, at in steps.items())
    write_whole(config, "".join(entries).encode())


def frame_by_label(thumbnails: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Return the thumbnails uint8 [N, side, side, 3], each with a frame in the colour of its label."""
    names = sorted(set(labels))
    # hues far apart, in three levels of lightness, because neighbouring labels must differ most
    hues = [colorsys.hls_to_rgb(index * 0.618 % 1, (0.45, 0.6, 0.35)[index % 3], 0.85) for index in range(len(names))]
    colours = dict(zip(names, np.rint(np.array(hues) * 255).astype(np.uint8), strict=True))
    framed, width = thumbnails.copy(), max(round(thumbnails.shape[1] * _FRAME), 1)
    inner = np.zeros(thumbnails.shape[1:3], bool)
    inner[width:-width, width:-width] = True
    for thumbnail, label in zip(framed, labels, strict=True):
        thumbnail[~inner] = colours[label]
    return framed
