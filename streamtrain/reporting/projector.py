"""Files of TensorBoard's embedding projector, for the first and the latest features of a run.

``SummaryWriter.add_embedding`` adds a folder at each call, which fills the disk in a long run, and drops the earlier
entries when a run is resumed.
"""

from __future__ import annotations

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


def write_features(
    folder: Path, step: int, features: np.ndarray, labels: Sequence[str], thumbnails: np.ndarray
) -> None:
    """Write features float [N, D] with labels and thumbnails uint8 [N, side, side, 3]; the latest ones are replaced.

    ``folder`` is the folder of the event files. Raises OSError.
    """
    path, config = folder / "projector", folder / CONFIG_NAME
    path.mkdir(exist_ok=True)
    written = re.search(rb'"first, step (\d{1,15})"', config.read_bytes()) if config.exists() else None
    steps = {"first": step}
    if written and int(written[1]) < step:
        steps = {"latest": step, "first": int(written[1])}
    name = next(iter(steps))
    columns = math.ceil(math.sqrt(len(thumbnails)))
    side = thumbnails.shape[1]
    # the projector expects a square grid of square images
    sprite = np.zeros((columns * side, columns * side, 3), np.uint8)
    for index, thumbnail in enumerate(thumbnails):
        top, left = index // columns * side, index % columns * side
        sprite[top : top + side, left : left + side] = thumbnail
    Image.fromarray(sprite).save(path / f"{name}.png")
    rows = ("\t".join(f"{value:.5g}" for value in row) for row in features)
    (path / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    # the file has a line for each label
    lines = "".join(printable(label.replace("\t", " ")) + "\n" for label in labels)
    (path / f"{name}-labels.tsv").write_text(lines, encoding="utf-8")
    entries = (_ENTRY.format(name=each, step=at, side=side) for each, at in steps.items())
    write_whole(config, "".join(entries).encode())
