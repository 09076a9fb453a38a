from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import own_names
from safetensors.torch import load_file
from tiny_backbone import tiny_backbone

from streamtrain.errors import StreamtrainError
from streamtrain.interop.load import load_backbone
from streamtrain.interop.timm_folder import export_timm, mlp_ratio

VARIANTS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": {"mlp": "swiglu", "mlp_hidden": 50},
    "no_bias": {"qkv_bias": False, "num_registers": 2, "rope_base": 50.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_folder_has_everything_that_timm_needs(variant: str, tmp_path: Path) -> None:
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
    again, before = own_names(tensors), backbone.model.state_dict()
    assert set(before) - set(again) == {"embedding.mask_token"}
    assert all(torch.equal(again[name], before[name]) for name in again)


@pytest.mark.parametrize("variant", [*VARIANTS, "no_registers"])
def test_a_timm_folder_loads_without_timm(variant: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(**VARIANTS.get(variant, {"num_registers": 0}))
    export_timm(backbone.model, backbone.config, tmp_path)
    loaded = load_backbone(tmp_path)
    expected, state = backbone.model.state_dict(), loaded.model.state_dict()
    for name in state.keys() - {"embedding.mask_token"}:
        assert torch.equal(state[name], expected[name]), name
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.forward_features(images).patches, backbone.forward_features(images).patches)
    assert loaded.config.mean == backbone.config.mean and loaded.config.image_size == 32


def test_a_published_timm_config_without_model_args_is_enough(tmp_path: Path) -> None:
    backbone = tiny_backbone(dim=128, num_heads=2)
    export_timm(backbone.model, backbone.config, tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["model_args"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert load_backbone(tmp_path).config.model.num_heads == 2
    (tmp_path / "config.json").write_text(json.dumps({**document, "architecture": "resnet50"}))
    with pytest.raises(StreamtrainError, match="is timm's resnet50; only its DINOv3 ViTs are supported"):
        load_backbone(tmp_path)


def test_models_that_timm_cannot_express_are_refused(tmp_path: Path) -> None:
    for variant, words in (({"norm_eps": 1e-6}, "norm_eps"), ({"key_bias": True}, "key bias")):
        backbone = tiny_backbone(**variant)
        with pytest.raises(StreamtrainError, match=words):
            export_timm(backbone.model, backbone.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hidden", [32, 33, 50, 1365, 2730])
def test_mlp_ratio_survives_truncation(hidden: int) -> None:
    model = tiny_backbone(mlp_hidden=hidden).config.model
    assert int(model.dim * mlp_ratio(model)) == hidden
