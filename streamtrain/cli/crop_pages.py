"""The page of ``streamtrain visualize crops``: what augmentation and masks make of images."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.packing.pack import PackOptions, pack
from shards.reading.shard_set import ShardSet
from streamtrain.config.load import build, load_config, merge, read_resolved
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.canvas import Tile, compose
from streamtrain.evaluation.maps import fit_to_patches, read_image
from streamtrain.reporting.panel import batch_panel

SHOWN_SIDE = 200


def draw_crops(arguments: argparse.Namespace) -> Image.Image:
    """A row an image: the image, and several draws of the views that a run of this configuration would train on."""
    if (arguments.run is None) == (arguments.config is None):
        raise StreamtrainError("give the recipe: one of --run and --config")
    config = read_resolved(arguments.run) if arguments.run else load_config(arguments.config, arguments.overrides)
    config = build(merge(config.model_dump(), one_image(arguments.draws)))
    rows = []
    for path in arguments.image:
        image = fit_to_patches(read_image(path), SHOWN_SIDE, 1)
        panel = Image.fromarray(drawn(path, config))
        rows.append([Tile(image, path.name), Tile(panel, "each row one draw of its views")])
    crops = config.crops
    views = f"{crops.global_count} x {crops.global_size} px and {crops.local_count} x {crops.local_size} px"
    return compose("What the network is fed", f"{arguments.run or arguments.config} · {views}", rows)


def one_image(draws: int) -> dict[str, Any]:
    """Settings for a stream that gives the same image again and again."""
    data = {"micro_batch": draws, "global_batch": None, "lanes": 1, "window": 1, "cache": {"dir": None, "limit": None}}
    return {"data": data, "monitor": {"panel_samples": draws}}


def drawn(path: Path, config: Config) -> np.ndarray:
    """The panel of a stream of one image: uint8 [height, width, 3]."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        shutil.copy(path, folder / "images" / path.name)
        pack(folder / "images", folder / "set", PackOptions())
        shard_set = ShardSet.open(folder / "set")
        with closing(Loader(shard_set, config, rank=0, world_size=1, device="cpu")) as loader:
            return batch_panel(next(loader), config.monitor.panel_samples)
