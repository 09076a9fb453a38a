"""Weights convert to the published families and back bit for bit, and give the same features there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from converted import in_memory, own_names
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, DINOv3ViTConfig

from streamtrain.config.model import ModelConfig
from streamtrain.errors import StreamtrainError
from streamtrain.interop.load_pretrained import MatchReport
from streamtrain.interop.naming import to_hf, to_timm
from streamtrain.model.initialise import initialise
from streamtrain.model.vit import VisionTransformer

SHAPES: dict[str, dict[str, object]] = {
    "mlp": {},
    "swiglu": {"mlp": "swiglu", "mlp_hidden": 40},
    "no-bias": {"mlp": "swiglu", "mlp_hidden": 40, "qkv_bias": False},
    "no-registers": {"num_registers": 0},
}


def make(fields: Mapping[str, object]) -> tuple[VisionTransformer, ModelConfig]:
    tiny = {"dim": 24, "depth": 11, "num_heads": 2, "patch_size": 4, "num_registers": 2, "layerscale": 0.5}
    config = ModelConfig.model_validate({**tiny, **fields})
    model = VisionTransformer(config)
    initialise(model, config, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False), config


def shapes(model: VisionTransformer) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def to_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's state as DINOv3 saves it: masked key bias, RoPE periods, prefixed names."""
    result: dict[str, Tensor] = {"rope_embed.periods": torch.ones(3)}
    dim = state["embedding.cls_token"].shape[1]
    outside = {"embedding.cls_token": "cls_token", "embedding.register_tokens": "storage_tokens"}
    outside |= {"cls_norm.weight": "cls_norm.weight", "cls_norm.bias": "cls_norm.bias"}
    outside |= {"local_norm.weight": "local_cls_norm.weight", "local_norm.bias": "local_cls_norm.bias"}
    for name, value in state.items():
        if name in outside:
            result[outside[name]] = value if "norm" in name else value[None]
        elif name == "embedding.projection.weight":
            result["patch_embed.proj.weight"] = value.reshape(dim, 3, 4, 4)
        elif name.endswith("attention.qkv.bias"):
            theirs = name.replace("attention", "attn")
            result[theirs] = torch.cat([value[:dim], torch.full((dim,), 7.0), value[dim:]])
            result[f"{theirs}_mask"] = torch.ones(3 * dim)
        elif "mlp.gate_up" in name:
            for theirs, half in zip(("w1", "w2"), value.chunk(2), strict=True):
                result[name.replace("gate_up", theirs)] = half
        else:
            swiglu = "blocks.0.mlp.gate_up.weight" in state
            renamed = name.replace("embedding.projection", "patch_embed.proj").replace("embedding.", "")
            renamed = renamed.replace("attention", "attn").replace("scale", "ls")
            renamed = renamed.replace("mlp.up", "mlp.fc1").replace("mlp.down", "mlp.w3" if swiglu else "mlp.fc2")
            result[renamed] = value
    return {f"teacher.backbone.{name}": value for name, value in result.items()}


def match_backbone(
    state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], minimum: float = 0.95
) -> tuple[dict[str, Tensor], MatchReport]:
    read, report = in_memory(state).match(expected, minimum)
    values = {name: read(name) for name in expected}
    return {name: value for name, value in values.items() if value is not None}, report


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("there", "lost"), [(to_hf, set()), (to_timm, {"embedding.mask_token"}), (to_dinov3, set())],
    ids=["hf", "timm", "dinov3"],
)  # fmt: skip
def test_round_trips_are_exact(
    shape: str, there: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], lost: set[str]
) -> None:
    state = make(SHAPES[shape])[0].state_dict()
    returned = own_names(there(state))
    assert returned.keys() == state.keys() - lost
    assert all(torch.equal(returned[name], state[name]) for name in returned)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_a_saved_file_and_computes_the_same_features(shape: str, tmp_path: Path) -> None:
    model, config = make(SHAPES[shape])
    described = DINOv3ViTConfig(
        patch_size=config.patch_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        hidden_act="silu" if config.mlp == "swiglu" else "gelu",
        use_gated_mlp=config.mlp == "swiglu",
        num_register_tokens=config.num_registers,
        query_bias=config.qkv_bias,
        value_bias=config.qkv_bias,
    )
    described.save_pretrained(tmp_path)
    # released files have the older, flat names
    save_file(
        {name: value.contiguous() for name, value in to_hf(model.state_dict()).items()}, tmp_path / "model.safetensors"
    )
    theirs, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    pixels = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.eval()(pixels).last_hidden_state
    got = model.forward_features(pixels)
    torch.testing.assert_close(
        torch.cat([got.cls[:, None], got.registers, got.patches], 1), expected, atol=1e-5, rtol=1e-5
    )

    theirs.save_pretrained(tmp_path / "again")
    for state in (theirs.state_dict(), load_file(tmp_path / "again" / "model.safetensors")):
        returned = own_names(state)
        assert all(torch.equal(returned[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("there", [to_hf, to_timm])
def test_a_key_bias_is_never_lost(there: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> None:
    model, _ = make({"key_bias": True})
    state = model.state_dict()
    name = "blocks.3.attention.qkv.bias"
    assert torch.equal(own_names(there(state))[name], state[name])
    # with RoPE the key bias changes the attention scores
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    before = model.forward_features(pixels).cls
    state[name][24:-24] += 1.0
    assert (model.forward_features(pixels).cls - before).abs().max() > 1e-5


def test_timm_names() -> None:
    state = to_timm(make({"depth": 1})[0].state_dict())
    block = ["gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias", "attn.qkv.weight"]
    block += [
        f"{part}.{kind}"
        for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    outside = {"cls_token": (1, 1, 24), "reg_token": (1, 2, 24), "patch_embed.proj.weight": (24, 3, 4, 4)}
    outside |= {"patch_embed.proj.bias": (24,), "norm.weight": (24,), "norm.bias": (24,)}
    assert state.keys() == {*outside, *(f"blocks.0.{name}" for name in block)}
    assert all(state[name].shape == shape for name, shape in outside.items())
    gated = to_timm(make({**SHAPES["swiglu"], "depth": 1})[0].state_dict())
    assert gated["blocks.0.mlp.fc1_g.weight"].shape == gated["blocks.0.mlp.fc1_x.weight"].shape == (40, 24)


def test_untied_norms_convert_in_dinov3_only() -> None:
    state = make({"untied_norms": "cls_and_local_cls"})[0].state_dict()
    untied = {f"{norm}.{part}" for norm in ("cls_norm", "local_norm") for part in ("weight", "bias")}
    back = own_names(to_dinov3(state))
    assert all(torch.equal(back[name], state[name]) for name in untied)
    assert own_names(to_hf(state)).keys() == state.keys() - untied


def test_buffers_are_ignored_and_heads_are_unexpected() -> None:
    state = to_dinov3(make({})[0].state_dict())
    state["teacher.dino_head.last_layer.weight"] = torch.ones(2, 2)
    _, report = match_backbone(state, shapes(make({})[0]))
    assert list(report.unexpected) == ["teacher.dino_head.last_layer.weight"]


def test_match_report() -> None:
    model, _ = make({"untied_norms": "local_cls"})
    state = to_hf(model.state_dict())
    state["layer.0.norm1.weight"] = torch.ones(5)
    state["classifier.weight"] = torch.ones(3, 24)
    found, report = match_backbone(state, shapes(model))
    assert report.missing == ("local_norm.weight", "local_norm.bias")
    assert report.reshaped == ("blocks.0.norm1.weight",)
    assert report.unexpected == ("classifier.weight",)
    assert found.keys() == set(report.matched) and len(found) == len(shapes(model)) - 3
    assert 0.95 < report.share < 1.0
    assert "missing 2: local_norm.weight, local_norm.bias" in report.text()


def test_biases_of_a_source_without_any_are_zeros() -> None:
    source, _ = make({"qkv_bias": False})
    wanted = shapes(make({})[0])
    found, report = match_backbone(to_timm(source.state_dict()), wanted)
    assert len(report.zeroed) == 11 and report.missing == ("embedding.mask_token",)
    assert not found["blocks.3.attention.qkv.bias"].any()


def test_own_names_match_with_and_without_heads() -> None:
    model, _ = make({})
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    found, report = match_backbone({**state, "global_head.prototypes.weight": torch.ones(2, 2)}, shapes(model))
    assert report.share == 1.0 and report.unexpected == ("global_head.prototypes.weight",)
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_another_model_is_refused() -> None:
    wanted = shapes(make({})[0])
    for fields in ({"dim": 32}, {"depth": 6}, {"mlp": "swiglu"}):
        with pytest.raises(StreamtrainError, match="set the model section") as caught:
            match_backbone(to_hf(make(fields)[0].state_dict()), wanted)
        assert "\n" not in str(caught.value)
