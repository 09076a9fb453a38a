from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbone import tiny_backbone

from streamtrain.errors import StreamtrainError
from streamtrain.interop.naming import from_timm
from streamtrain.interop.timm_folder import export_timm, mlp_ratio

VARIANTS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": {"mlp": "swiglu", "mlp_hidden": 50},
    "no_bias": {"qkv_bias": False, "num_registers": 2, "rope_base": 50.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_folder_says_all_that_timm_asks(variant: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(**VARIANTS[variant])
    export_timm(backbone.model, backbone.config, tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    model = backbone.config.model
    assert int(arguments["embed_dim"] * arguments["mlp_ratio"]) == model.hidden
    assert arguments["num_reg_tokens"] == model.num_registers and arguments["rope_temperature"] == model.rope_base
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["patch_embed.proj.weight"].shape == (32, 3, 8, 8)
    assert ("blocks.0.mlp.fc1_g.weight" in tensors) == (variant == "swiglu")
    assert ("blocks.1.attn.q_bias" in tensors) == (variant != "no_bias")
    again, before = from_timm(tensors), backbone.model.state_dict()
    assert set(before) - set(again) == {"embedding.mask_token"}
    assert all(torch.equal(again[name], before[name]) for name in again)


def test_what_timm_cannot_be_is_refused(tmp_path: Path) -> None:
    for variant, words in (({"norm_eps": 1e-6}, "norm_eps"), ({"key_bias": True}, "key bias")):
        backbone = tiny_backbone(**variant)
        with pytest.raises(StreamtrainError, match=words):
            export_timm(backbone.model, backbone.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hidden", [32, 33, 50, 1365, 2730])
def test_ratio_survives_being_cut_to_an_integer(hidden: int) -> None:
    model = tiny_backbone(mlp_hidden=hidden).config.model
    assert int(model.dim * mlp_ratio(model)) == hidden
