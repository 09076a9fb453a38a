"""A backbone as a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads; timm not needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from streamtrain.config.model import ModelConfig
from streamtrain.errors import StreamtrainError
from streamtrain.interop.folder import CONFIG_NAME, WEIGHTS_NAME, BackboneConfig, check_one_norm
from streamtrain.interop.naming import to_timm
from streamtrain.model.vit import VisionTransformer

# The model whose family ours belongs to; its sizes are all overridden.
ARCHITECTURE = "vit_small_patch16_dinov3_qkvb"
NORM_EPS = 1e-5  # part of the architecture: the folder's config cannot say another


def export_timm(model: VisionTransformer, config: BackboneConfig, out: Path) -> None:
    """Write ``out``/config.json and ``out``/model.safetensors; the weights are there last, and whole.

    Raises:
        StreamtrainError: for a model that timm's family cannot express.
    """
    check_one_norm(config, "timm")
    if config.model.norm_eps != NORM_EPS:
        raise StreamtrainError(f"timm's DINOv3 models have norm_eps {NORM_EPS}, this one {config.model.norm_eps}")
    if config.model.key_bias:
        # RoPE turns a key bias by each key's position, so it does move the scores and cannot be left out.
        raise StreamtrainError("timm's DINOv3 models have no key bias, this one has: export it --to hf")
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_NAME).write_text(json.dumps(timm_config(config), indent=2) + "\n", encoding="utf-8")
    partial = out / f".{WEIGHTS_NAME}.partial"
    tensors = {name: value.contiguous() for name, value in to_timm(model.state_dict()).items()}
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, out / WEIGHTS_NAME)


def timm_config(config: BackboneConfig) -> dict[str, Any]:
    """The ``config.json`` of a timm folder."""
    model, size = config.model, config.image_size
    return {
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "num_features": model.dim,
        "model_args": {
            "img_size": size,
            "patch_size": model.patch_size,
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
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def mlp_ratio(model: ModelConfig) -> float:
    """A ratio whose product with the width, cut to an integer as timm does, is the hidden width."""
    ratio = model.hidden / model.dim
    return ratio if int(model.dim * ratio) == model.hidden else (model.hidden + 0.5) / model.dim
