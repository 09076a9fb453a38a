"""``streamtrain visualize crops``: the training crops and masks that a configuration draws from images."""

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
from streamtrain.config.load import RESOLVED_NAME, build, load_config, merge, read_resolved
from streamtrain.config.tree import Config
from streamtrain.data.loader import Loader
from streamtrain.data.still_images import as_picture, decode_image
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.maps import fit_to_patches
from streamtrain.evaluation.pages import crops_page
from streamtrain.reporting.panel import batch_panel

SHOWN_SIDE = 200


def draw_crops(arguments: argparse.Namespace) -> Image.Image:
    """Return a page with a row per image: the image, and several draws of its training crops."""
    if (arguments.run is None) == (arguments.config is None):
        raise StreamtrainError("give the recipe: one of --run and --config")
    if arguments.run:
        read_resolved(arguments.run)  # raises an error if this is not a run directory
    name = str(arguments.run / RESOLVED_NAME) if arguments.run else arguments.config
    config = load_config(name, arguments.overrides)
    own = config.data.augmentations
    if arguments.run and own and not any(word.startswith("data.augmentations=") for word in arguments.overrides):
        # the run may be another person's, and importing a module executes it
        raise StreamtrainError(
            f"the recipe of {arguments.run} has its author's own code, {own}: if you trust it, add "
            f"data.augmentations={own}; add data.augmentations=null to leave it out"
        )
    config = build(merge(config.model_dump(), repeat_one_image(arguments.draws)))
    background, pixels, ranges = config.data.background_color, config.data.pixels, config.crops.value_range
    stills = (decode_image(path, path, background, pixels) for path in arguments.image)
    channels = config.monitor.panel_channels
    images = [as_picture(fit_to_patches(still, SHOWN_SIDE, 1), ranges, channels) for still in stills]
    crops = config.crops
    views = f"{crops.global_count} x {crops.global_size} px and {crops.local_count} x {crops.local_size} px"
    names = [path.name for path in arguments.image]
    panels = [draw_panel(path, config) for path in arguments.image]
    return crops_page(images, names, panels, f"{arguments.run or arguments.config} · {views}")


def repeat_one_image(draws: int) -> dict[str, Any]:
    """Return settings for a stream whose micro-batch is ``draws`` samples of one image."""
    data = {"micro_batch": draws, "global_batch": None, "lanes": 1, "window": 1, "cache": {"dir": None, "limit": None}}
    return {"data": data, "monitor": {"panel_samples": draws}}


def draw_panel(path: Path, config: Config) -> np.ndarray:
    """Return the panel of the first batch of a stream of one image: uint8 [height, width, 3]."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        shutil.copy(path, folder / "images" / path.name)
        pack(folder / "images", folder / "set", PackOptions(pixels=config.data.pixels))
        shard_set = ShardSet.open(folder / "set")
        with closing(Loader(shard_set, config, rank=0, world_size=1, device="cpu")) as loader:
            return batch_panel(next(loader), config)
