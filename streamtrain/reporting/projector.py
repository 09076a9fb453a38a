"""TensorBoard's projector: the files it reads beside the events, for the first features of a run and the latest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from streamtrain.run.atomic_io import replace_file

CONFIG_NAME = "projector_config.pbtxt"


def write_features(
    folder: Path, step: int, features: np.ndarray, labels: Sequence[str], thumbnails: np.ndarray
) -> None:
    """Show features float [N, D] with a name and a thumbnail (uint8 [N, side, side, 3]) each.

    What stood there of a later step than the first is replaced, so that a long run fills no disk.

    Args:
        folder: of the event files.

    Raises:
        OSError: if they cannot be written.
    """
    place = folder / "projector"
    place.mkdir(exist_ok=True)
    first = place / "first.step"
    name = "latest"
    begun = _step_in(first)
    if begun is None or begun >= step:
        name = "first"
        replace_file(first, f"{step}\n".encode())
    columns = math.ceil(math.sqrt(len(thumbnails)))
    side = thumbnails.shape[1]
    # the projector wants a square of squares
    sprite = np.zeros((columns * side, columns * side, 3), np.uint8)
    for index, thumbnail in enumerate(thumbnails):
        top, left = index // columns * side, index % columns * side
        sprite[top : top + side, left : left + side] = thumbnail
    Image.fromarray(sprite).save(place / f"{name}.png")
    rows = ("\t".join(f"{value:.5g}" for value in row) for row in features)
    (place / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    (place / f"{name}-labels.tsv").write_text("\n".join(label.replace("\t", " ") for label in labels) + "\n")
    replace_file(place / f"{name}.step", f"{step}\n".encode())
    entries = []
    for known in ("latest", "first"):
        known_step = _step_in(place / f"{known}.step")
        if known_step is not None:
            entries.append(_ENTRY.format(name=known, step=known_step, side=side))
    replace_file(folder / CONFIG_NAME, "".join(entries).encode())


def _step_in(path: Path) -> int | None:
    """The step in a file; None where it is missing or was torn."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


_ENTRY = """embeddings {{
  tensor_name: "{name}, step {step}"
  tensor_path: "projector/{name}.tsv"
  metadata_path: "projector/{name}-labels.tsv"
  sprite {{
    image_path: "projector/{name}.png"
    single_image_dim: {side}
    single_image_dim: {side}
  }}
}}
"""
