from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbone import tiny_backbone

from streamtrain.errors import StreamtrainError
from streamtrain.interop.hf import backbone_config_from_hf, export_hf, hf_config
from streamtrain.interop.load import load_backbone, load_weights
from streamtrain.interop.timm_folder import export_timm

VARIANTS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "swiglu": {"mlp": "swiglu", "mlp_hidden": 48},
    "key_bias": {"key_bias": True, "num_registers": 2},
    "no_bias": {"qkv_bias": False, "num_registers": 0, "untied_norms": "none"},
    "untied": {"untied_norms": "local_cls", "rope_rescale": 2.0, "rope_base": 50.0, "norm_eps": 1e-6},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_loads_an_export_and_computes_the_same_features(variant: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = tiny_backbone(**VARIANTS[variant])
    export_hf(backbone.model, backbone.config, tmp_path)
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(theirs).__name__ == "DINOv3ViTModel" and theirs.dtype == torch.float32
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    ours = backbone.model.forward_features(images)
    with torch.no_grad():
        output = theirs.eval()(images)
    prefix = 1 + backbone.config.model.num_registers
    torch.testing.assert_close(output.pooler_output, ours.cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.last_hidden_state[:, prefix:], ours.patches, rtol=1e-5, atol=1e-5)
    assert ours.cls.std() > 0.1 and (ours.patches[0] - ours.patches[1]).abs().max() > 0.1


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "untied"])
def test_an_exported_folder_loads_bit_for_bit(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = tiny_backbone(**VARIANTS[variant])
    export_hf(backbone.model, backbone.config, tmp_path)
    again = load_weights(tmp_path)
    before, after = backbone.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(backbone.model.forward_features(images).cls, again.model.forward_features(images).cls)
    assert (again.config.mean, again.config.std) == (backbone.config.mean, backbone.config.std)
    assert again.config.image_size == 32


def test_a_folder_in_several_files_loads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = tiny_backbone()
    export_hf(backbone.model, backbone.config, tmp_path / "whole")
    hf_model = transformers.AutoModel.from_pretrained(tmp_path / "whole")
    hf_model.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert not (tmp_path / "pieces" / "model.safetensors").exists()
    state, expected = load_backbone(tmp_path / "pieces").model.state_dict(), backbone.model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_preprocessing_and_model_card_describe_the_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = tiny_backbone()
    export_hf(backbone.model, backbone.config, tmp_path)
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": 32} and preprocessor["crop_size"] == {"height": 32, "width": 32}
    assert preprocessor["image_mean"] == list(backbone.config.mean)
    card = (tmp_path / "README.md").read_text()
    assert "from_pretrained" in card and "last_hidden_state[:, 5:]" in card and "step: 0" in card


@pytest.mark.parametrize("export", [export_hf, export_timm])
def test_two_final_norms_are_refused(export: Callable[..., None], tmp_path: Path) -> None:
    backbone = tiny_backbone(untied_norms="cls")
    with pytest.raises(StreamtrainError, match="have one final norm"):
        export(backbone.model, backbone.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_config_keys_have_the_defaults_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.DINOv3ViTConfig()
    assert hf_config(backbone_config_from_hf({}, None)) == {
        key: getattr(theirs, key)
        for key in hf_config(backbone_config_from_hf({}, None))
        if not key.startswith("pos_embed")
    } | {"pos_embed_rescale": None, "pos_embed_jitter": None, "pos_embed_shift": None}
    with pytest.raises(StreamtrainError, match="hidden_act 'relu'"):
        backbone_config_from_hf({"hidden_act": "relu"}, None)


def test_without_transformers_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    backbone = tiny_backbone()
    with pytest.raises(StreamtrainError, match="pip install -U transformers"):
        export_hf(backbone.model, backbone.config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
