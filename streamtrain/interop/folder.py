"""Our own format: the backbone's tensors under our names, with the model's config in the file and beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import Field
from safetensors.torch import save_file

from streamtrain.config.model import ModelConfig
from streamtrain.config.section import Positive, Section
from streamtrain.errors import StreamtrainError
from streamtrain.model.vit import VisionTransformer

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# beside an export of a run, the settings of that run
RECIPE_NAME = "recipe.yaml"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Origin = dict[str, str | int | float | None]


class BackboneConfig(Section):
    """What must be known to use a backbone.

    ``image_size`` is the side in pixels of the global crops it was trained on; any multiple of the patch works.
    ``mean`` and ``std`` are of the channels, in 0..1. ``origin`` says where the weights came from.
    """

    model: ModelConfig
    image_size: Positive
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    origin: Origin = Field(default_factory=dict)


def check_one_norm(config: BackboneConfig, family: str) -> None:
    """Refuse what the DINOv3 models of ``family`` cannot express: a norm for CLS and registers, another for patches.

    Raises:
        StreamtrainError: if this model has two.
    """
    if config.model.cls_norm:
        raise StreamtrainError(
            f"{family}'s DINOv3 models have one final norm, this one has another for CLS and registers "
            f"(model.untied_norms {config.model.untied_norms}): export it --to safetensors"
        )


def export_safetensors(model: VisionTransformer, config: BackboneConfig, out: Path) -> None:
    """Write ``out``/model.safetensors and ``out``/config.json; the weights are there last, and whole.

    The config is in the file's header too, so that the one file is enough to load the model.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = config.model_dump_json(indent=1)
    (out / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    partial = out / f".{WEIGHTS_NAME}.partial"
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    # "format" is what readers of the Hugging Face ecosystem look for.
    metadata = {"format": "pt", "streamtrain": json.dumps(json.loads(text))}
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, out / WEIGHTS_NAME)
