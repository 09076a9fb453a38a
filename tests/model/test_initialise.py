"""Every initial value follows a rule, regardless of previous memory contents and of the order of names."""

from __future__ import annotations

import pytest
import torch

from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.model.initialise import initial_value, initialise
from streamtrain.training.ssl_model import SSLModel


def tiny() -> Config:
    head = {"prototypes": 96, "hidden": 32, "bottleneck": 16}
    return build(
        {
            "model": {
                "dim": 64,
                "depth": 2,
                "num_heads": 2,
                "patch_size": 8,
                "mlp": "swiglu",
                "untied_norms": "local_cls",
            },
            "objective": {"global_loss": {"head": head}, "patch_loss": {"head": head}},
            "crops": {"global_size": 32, "local_size": 16},
        }
    )


def test_every_parameter_is_overwritten() -> None:
    config = tiny()
    model = SSLModel(config)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    initialise(model, config.model, seed=3)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    assert not list(model.buffers()), "a buffer would be neither initialised nor sharded"


def test_values_follow_their_rules() -> None:
    config = tiny()
    model = SSLModel(config)
    initialise(model, config.model, seed=3)
    values = dict(model.named_parameters())
    assert values["backbone.blocks.0.attention.qkv.bias"].shape == (2 * 64,)
    for name, value in values.items():
        if name.endswith(("bias", "mask_token")):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("gamma"):
            assert (value == config.model.layerscale).all(), name
        elif name != "backbone.embedding.projection.weight":
            assert value.std().item() == pytest.approx(0.02, rel=4 / (2 * value.numel()) ** 0.5), name
            assert abs(value.mean().item()) < 4 * 0.02 / value.numel() ** 0.5, name
    projection = values["backbone.embedding.projection.weight"]
    assert projection.abs().max() <= (3 * 8 * 8) ** -0.5
    assert projection.std().item() == pytest.approx((3 * 8 * 8 * 3) ** -0.5, rel=0.05)


def test_a_value_depends_on_name_and_seed_only() -> None:
    config = tiny().model
    names = [
        "backbone.blocks.0.mlp.down.weight",
        "backbone.blocks.1.mlp.down.weight",
        "backbone.blocks.0.mlp.down.weight",
    ]
    first, other, again = (initial_value(name, (8, 8), config, 0) for name in names)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, initial_value(names[0], (8, 8), config, 1))
    assert torch.equal(first, initial_value("blocks.0.mlp.down.weight", (8, 8), config, 0))


def test_a_name_without_a_rule_raises() -> None:
    with pytest.raises(ValueError, match="parameter 'blocks"):
        initial_value("backbone.blocks.0.mlp.scale", (2,), tiny().model, 0)


def test_construction_on_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        model = SSLModel(build({"model": {"preset": "vit7b16"}}))
    backbone = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert all(parameter.is_meta for parameter in model.parameters())
    # 6 716 M as published
    assert round(backbone / 1e6) == 6716
