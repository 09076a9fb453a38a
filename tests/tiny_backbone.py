"""A tiny network and a few labelled images, for tests of evaluation, export and tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.interop.folder import export_safetensors
from streamtrain.interop.load import Backbone, load_untrained

TINY = {"patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "drop_path": 0.0}
CROPS = {"global_size": 32, "local_size": 16}


def tiny_config(**model: Any) -> Config:
    """Return the configuration of a network with a few thousand parameters."""
    return build({"model": {**TINY, **model}, "crops": CROPS})


def tiny_backbone(**model: Any) -> Backbone:
    """Return that network with random LayerScale, biases and tokens, which are close to 0 in a fresh network."""
    backbone = load_untrained(tiny_config(**model))
    generator = torch.Generator().manual_seed(0)
    for name, value in backbone.model.named_parameters():
        if name.endswith("gamma"):
            value.data.uniform_(0.3, 0.7, generator=generator)
        elif name.endswith(("bias", "token", "tokens")):
            value.data.normal_(0, 0.2, generator=generator)
    return backbone


def tiny_weights(folder: Path, **model: Any) -> Path:
    """Export that network to ``folder``."""
    backbone = tiny_backbone(**model)
    export_safetensors(backbone.model, backbone.config, folder)
    return folder


def class_folder(folder: Path, classes: tuple[str, ...] = ("across", "down"), each: int = 10) -> Path:
    """Write images of horizontal or vertical stripes, about 40 pixels a side, in one subfolder per class."""
    rng = np.random.default_rng(len(classes))
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            height, width = rng.integers(36, 48, 2)
            rows, columns = np.mgrid[0:height, 0:width]
            wave = np.sin((columns if label % 2 else rows) * 0.8 + rng.uniform(0, 6))
            pixels = 128 + wave[..., None] * rng.uniform(40, 120, 3)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:03d}.png")
    return folder
