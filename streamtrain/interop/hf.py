"""Write Hugging Face folders that ``AutoModel.from_pretrained`` loads, and read their configs."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import (
    CONFIG_NAME,
    BackboneConfig,
    check_one_norm,
    own_preprocessing,
    parse_config,
    read_own_preprocessing,
)
from streamtrain.interop.model_card import CARD_NAME, hf_card
from streamtrain.interop.naming import to_hf
from streamtrain.model.vit import VisionTransformer

MODEL_TYPE = "dinov3_vit"
PREPROCESSOR_NAME = "preprocessor_config.json"
BICUBIC = 3  # Pillow's constant
# works with and without torchvision, and from transformers 4.56 on
IMAGE_PROCESSOR = "BitImageProcessor"
BACKGROUND = "background"
# keys of DINOv3ViTConfig and the fields of ModelConfig with the same values
_FIELDS = {
    "num_channels": "channels",
    "patch_size": "patch_size", "hidden_size": "dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
    "num_register_tokens": "num_registers", "layer_norm_eps": "norm_eps", "layerscale_value": "layerscale",
    "rope_theta": "rope_base", "query_bias": "qkv_bias", "key_bias": "key_bias",
}  # fmt: skip
# defaults of DINOv3ViTConfig, which config files may omit
_DEFAULTS = {
    "num_channels": 3,
    "patch_size": 16, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
    "hidden_act": "gelu", "use_gated_mlp": False, "num_register_tokens": 0, "layer_norm_eps": 1e-5,
    "layerscale_value": 1.0, "rope_theta": 100.0, "query_bias": True, "key_bias": False, "value_bias": True,
    "image_size": 224, "proj_bias": True, "mlp_bias": True,
}  # fmt: skip


def export_hf(model: VisionTransformer, config: BackboneConfig, out: Path) -> None:
    """Write config, weights, image preprocessing and a model card for ``transformers`` to ``out``.

    The tensors are shared with ``model``, not copied.

    Raises:
        StreamtrainError: if ``transformers`` is not installed or too old, or its family cannot express the model.
    """
    check_one_norm(config, "transformers")
    try:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
    except ImportError:
        raise StreamtrainError(
            "--to hf needs transformers with DINOv3 (4.56 or later): pip install -U transformers"
        ) from None
    with torch.device("meta"):
        hf_model = DINOv3ViTModel(DINOv3ViTConfig(**hf_config(config)))
    saved = to_hf(model.state_dict(), config.model.channels)
    state = {}
    for name in hf_model.state_dict():
        # in memory, the blocks are one level deeper than in saved files
        value = saved.pop(name if name in saved else name.removeprefix("model."))
        # through numpy, because transformers copies tensors that share storage, as query, key and value do
        state[name] = torch.from_numpy(value.detach().numpy())
    assert not saved, f"unexpected {sorted(saved)}"
    hf_model.load_state_dict(state, assign=True)
    with _without_progress_bar():
        hf_model.save_pretrained(out)
    (out / PREPROCESSOR_NAME).write_text(json.dumps(preprocessor_config(config), indent=2) + "\n")
    (out / CARD_NAME).write_text(hf_card(config), encoding="utf-8")


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar for the files of a model, which has only one."""
    from transformers.utils import logging

    is_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_shown:
            logging.enable_progress_bar()


def hf_config(config: BackboneConfig) -> dict[str, Any]:
    """Return the arguments of ``DINOv3ViTConfig``."""
    model = config.model
    return {
        **{key: getattr(model, field) for key, field in _FIELDS.items()},
        "intermediate_size": model.hidden,
        "hidden_act": "silu" if model.mlp == "swiglu" else "gelu",
        "use_gated_mlp": model.mlp == "swiglu",
        "value_bias": model.qkv_bias,
        "image_size": config.image_size,
        "pos_embed_rescale": model.rope_rescale,
        "pos_embed_jitter": model.rope_jitter,
        "pos_embed_shift": model.rope_shift,
    }


def backbone_config_from_hf(
    document: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, source: str = CONFIG_NAME
) -> BackboneConfig:
    """Return the description of a Hugging Face folder's model.

    Args:
        document: the folder's ``config.json``.
        preprocessor: its ``preprocessor_config.json``; None if there is none.
        source: the folder, for errors.

    Raises:
        StreamtrainError: for a variant that is not supported, or invalid values.
    """
    values: dict[str, Any] = {**_DEFAULTS, **document}
    supported = {
        "hidden_act": "silu" if values["use_gated_mlp"] else "gelu",
        "value_bias": values["query_bias"],
        "proj_bias": True,
        "mlp_bias": True,
    }
    for key, value in supported.items():
        if values[key] != value:
            shown = reprlib.repr(values[key])
            raise StreamtrainError(f"{source}: a DINOv3 ViT with {key} {shown} is not supported, only {value!r}")
    model = {
        "preset": None,
        "mlp": "swiglu" if values["use_gated_mlp"] else "gelu",
        "mlp_hidden": values["intermediate_size"],
        **{field: values[key] for key, field in _FIELDS.items()},
    }
    return parse_config(
        {
            "model": model,
            "image_size": values["image_size"],
            **preprocessing_from_hf(preprocessor or {}, source),
            "origin": {"source": "transformers"},
        },
        source,
    )


def preprocessor_config(config: BackboneConfig) -> dict[str, Any]:
    """Return the settings of an image processor of transformers that preprocesses as ``Backbone.preprocess`` does.

    The class is not that of Meta's DINOv3 folders, which needs torchvision and is used to squash images to a square.
    Its resize takes 8-bit RGB only, so other images must have the right size and are normalised in stored units.
    """
    if not config.pixels.is_rgb:
        return _value_preprocessor_config(config)
    moments = config.moments(255)
    return {
        "image_processor_type": IMAGE_PROCESSOR,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.resize},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": moments["mean"],
        "image_std": moments["std"],
        # only read by streamtrain
        BACKGROUND: config.background,
        **({} if config.is_scaled_by_255 else own_preprocessing(config)),
    }


def _value_preprocessor_config(config: BackboneConfig) -> dict[str, Any]:
    moments = config.moments()
    return {
        "image_processor_type": IMAGE_PROCESSOR,
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale"), False),
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_normalize": True,
        "image_mean": moments["mean"],
        "image_std": moments["std"],
        # only read by streamtrain
        **own_preprocessing(config),
    }


def preprocessing_from_hf(preprocessor: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of ``BackboneConfig`` that a ``preprocessor_config.json`` states.

    A processor that squashes images to a square gives a central crop of that size.

    Raises:
        StreamtrainError: for a crop that is not square, or pixels that are not scaled to 0..1.
    """
    background = {"background": preprocessor[BACKGROUND]} if BACKGROUND in preprocessor else {}
    if own := read_own_preprocessing(preprocessor):
        return own | background
    fields: dict[str, Any] = {}
    scale = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1
    if not (isinstance(scale, int | float) and abs(255 * scale - 1) < 1e-3):
        raise StreamtrainError(f"{source}: rescale_factor {reprlib.repr(scale)} is not supported, only 1/255")
    side = _shorter_side(preprocessor.get("size")) if preprocessor.get("do_resize", True) else None
    crop = preprocessor.get("crop_size") if preprocessor.get("do_center_crop", False) else None
    if isinstance(crop, dict) and crop.get("height") != crop.get("width"):
        raise StreamtrainError(f"{source}: a crop_size that is not square is not supported: {reprlib.repr(crop)}")
    crop = _shorter_side(crop)
    if side is not None or crop is not None:
        fields["image_size"] = side if crop is None else crop
        fields["resize"] = crop if side is None else side
    if preprocessor.get("do_normalize", True):
        stated = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
        fields |= {name: value for name, value in stated.items() if value is not None}
    else:
        fields |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return fields | background


def _shorter_side(size: object) -> object:
    """Return the shorter side in pixels that a ``size`` or ``crop_size`` states; None if it states none."""
    if not isinstance(size, dict):
        return size
    if "shortest_edge" in size:
        return size["shortest_edge"]
    sides = [side for side in (size.get("height"), size.get("width")) if isinstance(side, int)]
    return min(sides, default=None)
