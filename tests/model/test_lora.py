"""Adapters: a new one changes nothing, a merged one is equal to a separate one, and only adapters get gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_backbone import tiny_backbone, tiny_config

from streamtrain.config.load import build, merge
from streamtrain.errors import ConfigError
from streamtrain.model.factory import build_backbone
from streamtrain.model.fp8 import compute_in_fp8
from streamtrain.model.initialise import initialise
from streamtrain.model.vit import VisionTransformer
from streamtrain.ops.lora import Adapter
from streamtrain.ops.lora import merge as merge_adapter
from streamtrain.training.ssl_model import SSLModel

LORA = {"rank": 4, "alpha": 8.0}


def adapted(base: VisionTransformer, **lora: Any) -> VisionTransformer:
    """Return the network of ``tiny_backbone`` with new adapters."""
    config = tiny_config(lora={**LORA, **lora}).model
    network = build_backbone(config)
    initialise(network, config, seed=3)
    missing, unexpected = network.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(("lora_a", "lora_b")) for name in missing)
    return network


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def features(network: VisionTransformer) -> torch.Tensor:
    with torch.no_grad():
        out = network.forward_features(images())
    return torch.cat([out.cls[:, None], out.registers, out.patches], dim=1)


def test_new_adapters_change_nothing() -> None:
    base = tiny_backbone().model
    network = adapted(base)
    for block in base.blocks:
        # the CPU kernels round otherwise
        block.options = network.blocks[0].options
    assert torch.equal(features(network), features(base))
    values = dict(network.named_parameters())
    assert all(not value.any() for name, value in values.items() if name.endswith("lora_b"))
    first = values["blocks.0.mlp.down.lora_a"]
    assert 0.9 * 128**-0.5 < float(first.detach().abs().max()) <= 128**-0.5


def test_merged_adapters_equal_separate_ones() -> None:
    base = tiny_backbone().model
    network = adapted(base, blocks=1)
    values, draw = dict(network.named_parameters()), torch.Generator().manual_seed(1)
    for name, value in values.items():
        if name.endswith("lora_b"):
            value.data.normal_(0, 0.3, generator=draw)
    separate = features(network)
    assert (separate - features(base)).abs().max() > 0.1
    state = base.state_dict()
    names = [name.removesuffix(".lora_a") for name in values if name.endswith("lora_a")]
    assert names == [f"blocks.1.{layer}" for layer in ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")]
    for name in names:
        adapter = Adapter(values[f"{name}.lora_a"], values[f"{name}.lora_b"], 2.0)
        state[f"{name}.weight"] = merge_adapter(state[f"{name}.weight"], adapter)
    base.load_state_dict(state)
    torch.testing.assert_close(separate, features(base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("targets", [["qkv"], ["proj", "mlp"]])
def test_only_adapters_get_gradients(checkpointing: str, targets: list[str]) -> None:
    changes = {"model": {"lora": {**LORA, "targets": targets}}, "engine": {"checkpointing": checkpointing}}
    model = SSLModel(build(merge(tiny_config().model_dump(), changes)))
    initialise(model, model.config.model, seed=0)
    model.backbone.forward_features(images()).cls.sum().backward()
    got = {name for name, value in model.backbone.named_parameters() if value.grad is not None}
    assert got == {name for name, _ in model.backbone.named_parameters() if name.endswith(("lora_a", "lora_b"))}
    assert len(got) == 2 * 2 * (len(targets) + ("mlp" in targets))


def test_fp8_trains_adapters() -> None:
    model = SSLModel(build(merge(tiny_config(layerscale=0.5).model_dump(), {"model": {"lora": LORA}})))
    initialise(model, model.config.model, seed=0)
    model.to(torch.bfloat16)
    exact = model.backbone.forward_features(images()).patches
    compute_in_fp8(model)
    rough = model.backbone.forward_features(images()).patches
    assert 0 < float(((rough - exact).norm() / exact.norm()).detach()) < 0.1
    rough.float().square().sum().backward()
    values = dict(model.backbone.named_parameters())
    assert values["blocks.0.attention.qkv.lora_b"].grad.abs().max() > 0
    assert values["blocks.0.attention.qkv.weight"].grad is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"lora": {"alpha": 8.0}}, "alpha has an effect only with rank above 0"),
        ({"lora": {"rank": 2, "targets": ["head"]}}, "model.lora.targets.0"),
        ({"lora": {"rank": 2, "targets": []}}, "must name one or more layers"),
        ({"lora": {"rank": 2, "targets": ["qkv", "qkv"]}}, "each once"),
        ({"lora": {"rank": 64}}, "lora.rank 64 is larger than the narrowest adapted layer, 32"),
        ({"lora": {"rank": 2, "blocks": 3}}, "lora.blocks 3 and lora.free_blocks 0 are together more than depth 2"),
        ({"lora": {"rank": 2, "free_blocks": 2}}, "lora.free_blocks 2 leaves no block with adapters: depth is 2"),
        ({"lora": {"rank": 2}, "factory": "own_code:Backbone"}, "lora needs the built-in network"),
    ],
)
def test_settings_that_cannot_work_are_refused(model: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        build({"model": {"patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, **model}})
    assert "\n" not in str(refused.value)
