"""Write and describe folders that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads, without timm."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

from shards.format.pixels import MAX_CHANNELS
from streamtrain.config.model import ModelConfig
from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneConfig,
    check_one_norm,
    own_preprocessing,
    parse_config,
    read_mapping,
    read_own_preprocessing,
    write_folder,
)
from streamtrain.interop.naming import to_timm
from streamtrain.model.vit import VisionTransformer

# a model of timm's DINOv3 family; the folder's config overrides all its sizes
ARCHITECTURE = "vit_small_patch16_dinov3_qkvb"
# fixed by the architecture
NORM_EPS = 1e-5


def export_timm(model: VisionTransformer, config: BackboneConfig, out: Path) -> None:
    """Write ``out``/config.json and ``out``/model.safetensors.

    Raises:
        StreamtrainError: if timm's family cannot express the model.
    """
    check_one_norm(config, "timm")
    if config.model.norm_eps != NORM_EPS:
        raise StreamtrainError(f"timm's DINOv3 models have norm_eps {NORM_EPS}, this one {config.model.norm_eps}")
    if config.model.key_bias:
        # it cannot be left out: with RoPE it changes the attention scores
        raise StreamtrainError("timm's DINOv3 models have no key bias, but this one has; export it with --to hf")
    write_folder(
        out,
        json.dumps(timm_config(config), indent=2),
        to_timm(model.state_dict(), config.model.channels),
        {"format": "pt"},
    )


def timm_config(config: BackboneConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a timm folder.

    ``mean`` and ``std`` are for 8-bit values divided by 255, as timm's transforms divide them, or for stored values of
    other types, which these transforms cannot read.
    """
    model, size, is_rgb = config.model, config.image_size, config.model.channels == 3
    values = "8-bit values divided by 255" if config.dtype == "uint8" else f"stored values ({config.dtype}, not scaled)"
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": model.dim,
        # only read by streamtrain; timm rejects unknown keys in pretrained_cfg
        "background": config.background,
        **({} if config.is_scaled_by_255 else own_preprocessing(config)),
        "model_args": {
            "img_size": size,
            "patch_size": model.patch_size,
            **({} if is_rgb else {"in_chans": model.channels}),
            "embed_dim": model.dim,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "mlp_ratio": mlp_ratio(model),
            "qkv_bias": model.qkv_bias,
            "num_reg_tokens": model.num_registers,
            "rope_temperature": model.rope_base,
            "global_pool": "token",
            **({"swiglu_mlp": True, "swiglu_align_to": 1} if model.mlp == "swiglu" else {}),
        },
        "pretrained_cfg": {
            "input_size": [model.channels, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": crop_share(size, config.resize),
            "crop_mode": "center",
            **config.moments(255 if config.dtype == "uint8" else 1),
            **({} if config.pixels.is_rgb else {"description": f"mean and std are for {values}"}),
            "num_classes": 0,
            "pool_size": None,
            # timm 1.0.22 would initialise this layer at random if it has other channels than 3; 1.0.31 reads it
            "first_conv": "patch_embed.proj" if is_rgb else None,
            "classifier": "head",
        },
    }


def is_own_config(document: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` was written by ``export_timm``; published ones name their source in a tag."""
    pretrained = document.get("pretrained_cfg")
    is_own = document.get("architecture") == ARCHITECTURE and "model_args" in document
    return is_own and isinstance(pretrained, dict) and "tag" not in pretrained


def crop_share(size: int, resize: int) -> float:
    """Return the share ``crop_pct`` from which timm computes the side before the crop: size over share, truncated."""
    share = size / resize
    return share if int(size / share) == resize else size / (resize + 0.5)


def mlp_ratio(model: ModelConfig) -> float:
    """Return the ratio from which timm computes the hidden width: width times ratio, truncated."""
    ratio = model.hidden / model.dim
    return ratio if int(model.dim * ratio) == model.hidden else (model.hidden + 0.5) / model.dim


def model_from_shapes(shapes: Mapping[str, Sequence[int]], channels: int = 3) -> dict[str, Any]:
    """Return the fields of ``ModelConfig`` that the shapes of a backbone's weights give: all sizes but the heads."""
    dim = shapes["embedding.cls_token"][1]
    registers, bias = shapes.get("embedding.register_tokens"), shapes.get("blocks.0.attention.qkv.bias")
    return {
        "preset": None,
        "channels": channels,
        "patch_size": isqrt(shapes["embedding.projection.weight"][1] // channels),
        "dim": dim,
        "depth": sum(name.endswith(".scale1.gamma") for name in shapes),
        "mlp": "swiglu" if "blocks.0.mlp.gate_up.weight" in shapes else "gelu",
        "mlp_hidden": shapes["blocks.0.mlp.down.weight"][1],
        "num_registers": 0 if registers is None else registers[0],
        "norm_eps": NORM_EPS,
        "qkv_bias": bias is not None,
        "key_bias": bias is not None and bias[0] == 3 * dim,
    }


def has_all_sizes(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Return whether weights have the tensors that ``model_from_shapes`` reads."""
    sizes = ("embedding.cls_token", "embedding.projection.weight", "blocks.0.mlp.down.weight")
    return all(len(shapes.get(name, ())) == 2 for name in sizes) and "blocks.0.attention.qkv.weight" in shapes


def backbone_config_from_timm(
    document: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], source: str
) -> BackboneConfig:
    """Return the description of a timm folder's model.

    Args:
        document: the folder's ``config.json``.
        shapes: of the weights, under streamtrain's names; they give all sizes but the number of heads.
        source: the folder, for errors.

    Raises:
        StreamtrainError: if the model is not one of timm's DINOv3 ViTs, or is described by invalid values.
    """
    if "dinov3" not in str(document["architecture"]) or not has_all_sizes(shapes):
        architecture = str(document["architecture"])[:60]
        raise StreamtrainError(f"{source} is timm's {architecture}; only its DINOv3 ViTs are supported")
    arguments, pretrained = (read_mapping(document, key, source) for key in ("model_args", "pretrained_cfg"))
    input_size = pretrained.get("input_size", (3, 256, 256))
    size = input_size[-1] if isinstance(input_size, list | tuple) and input_size else input_size
    dim = shapes["embedding.cls_token"][1]
    # all published models have heads of width 64, except the 7B model
    head_width = 128 if dim == 4096 else 64
    channels = arguments.get("in_chans", 3)
    if not (isinstance(channels, int) and 1 <= channels <= MAX_CHANNELS):
        raise StreamtrainError(f"{source}: in_chans {reprlib.repr(channels)} is not supported")
    model = {
        **model_from_shapes(shapes, channels),
        "num_heads": arguments.get("num_heads", dim // head_width),
        "rope_base": arguments.get("rope_temperature", 100.0),
    }
    return parse_config(
        {
            "model": model,
            "image_size": size,
            **read_margin(pretrained, size, source),
            "mean": pretrained.get("mean", IMAGENET_MEAN),
            "std": pretrained.get("std", IMAGENET_STD),
            **({"background": document["background"]} if "background" in document else {}),
            **read_own_preprocessing(document),
            "origin": {"source": "timm"},
        },
        source,
    )


def read_margin(pretrained: Mapping[str, Any], size: object, source: str) -> dict[str, int]:
    """Return ``resize`` of ``BackboneConfig`` if a ``pretrained_cfg`` states its ``crop_pct``.

    Raises:
        StreamtrainError: if that is not in 0.01..1.
    """
    share = pretrained.get("crop_pct")
    if share is None or not isinstance(size, int):
        return {}
    if not (isinstance(share, int | float) and 0.01 <= share <= 1):
        raise StreamtrainError(f"{source}: crop_pct {reprlib.repr(share)} is not in 0.01..1")
    # as timm computes it
    return {"resize": int(size / share)}
