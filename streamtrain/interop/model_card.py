"""README files of exported folders: the model, code that uses it, and its provenance."""

from __future__ import annotations

from streamtrain.interop.folder import RECIPE_NAME, BackboneConfig

CARD_NAME = "README.md"


def hf_card(config: BackboneConfig) -> str:
    """Return the card of a folder for transformers: the model, its use and its provenance."""
    model = config.model
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [dinov3, self-supervised, streamtrain]
---
{_describe_model(config)}

```python
from transformers import AutoImageProcessor, AutoModel
from transformers.image_utils import load_image

folder = "."    # run this in the folder of this file, or name that folder
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModel.from_pretrained(folder)
{_example_input(config)}
output = model(**inputs)
output.pooler_output                 # [1, {model.dim}], one vector per image
output.last_hidden_state[:, {1 + model.num_registers}:]   # [1, patches, {model.dim}], row by row
```

{_describe_processor(config, "The processor")}

{_describe_origin(config)}
"""


def onnx_card(config: BackboneConfig) -> str:
    """Return the card of a folder for ONNX runtimes: the model, its use with onnxruntime and its provenance."""
    model = config.model
    shape = f"[1, {model.channels}, {config.image_size}, {config.image_size}]"
    pillow = "\nfrom PIL import Image, ImageOps" if config.pixels.is_rgb else ""
    return f"""{_describe_model(config)}

```python
import json

import numpy as np
import onnxruntime{pillow}

folder = "."    # run this in the folder of this file, or name that folder
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
with open(f"{{folder}}/preprocessor_config.json") as file:
    settings = json.load(file)
{_onnx_input(config)}
pixels = (pixels - settings["image_mean"]) / settings["image_std"]
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)    # {shape}
cls, patches = session.run(["cls", "patches"], {{"pixel_values": pixels}})
cls         # [1, {model.dim}], one vector per image
patches     # [1, patches, {model.dim}], row by row
```

{_describe_processor(config, "This code")}

{_describe_origin(config)}
"""


def _describe_model(config: BackboneConfig) -> str:
    model = config.model
    return f"""# Vision transformer, width {model.dim}, depth {model.depth}

Trained without labels by streamtrain with the DINOv3 objective (arXiv:2508.10104):
patches of {model.patch_size} px, {model.num_heads} heads, {model.num_registers} register tokens, {model.mlp} MLP,
axial RoPE; input of {config.image_size} px."""


def _describe_origin(config: BackboneConfig) -> str:
    origin = "\n".join(f"- {key}: {value}" for key, value in config.origin.items() if value is not None)
    if "run" in config.origin:
        origin += f"\n\nAll settings of the training are in `{RECIPE_NAME}`."
    return origin


def _onnx_input(config: BackboneConfig) -> str:
    if not config.pixels.is_rgb:
        return f"""image = ...    # array {config.dtype} [height, width, {config.model.channels}]
size = settings["crop_size"]["height"]
top, left = ((side - size) // 2 for side in image.shape[:2])
pixels = image[top : top + size, left : left + size].astype(np.float32)"""
    return """image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
scale = settings["size"]["shortest_edge"] / min(image.size)
image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
size = settings["crop_size"]["height"]
left, top = ((side - size) // 2 for side in image.size)
pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255"""


def _example_input(config: BackboneConfig) -> str:
    shape = f"[1, {config.model.channels}, {config.image_size}, {config.image_size}]"
    if config.pixels.is_rgb:
        return f'inputs = processor(load_image("photo.jpg"), return_tensors="pt")    # {shape}'
    return f"""image = ...    # array {config.dtype} [height, width, {config.model.channels}]
inputs = processor(image, input_data_format="channels_last", return_tensors="pt")    # {shape}"""


def _describe_processor(config: BackboneConfig, who: str) -> str:
    if not config.pixels.is_rgb:
        return (
            f"The images of the training had {config.pixels}. {who} crops the central square of\n"
            f"{config.image_size} pixels and normalises stored values. It does not resize."
        )
    return (
        f"{who} resizes the shorter side to {config.resize} pixels (bicubic), crops the central square of\n"
        f"{config.image_size} pixels and normalises with the mean and deviation of training. "
        f"{_describe_alpha(config, who)}"
    )


def _describe_alpha(config: BackboneConfig, who: str) -> str:
    """Return a sentence about transparent images."""
    if config.background is None:
        return "The alpha channel of transparent images is dropped, as in training."
    colour = ", ".join(map(str, config.background))
    return f"Composite transparent images on RGB ({colour}), as in training. {who} drops their alpha channel."
