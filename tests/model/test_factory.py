"""A backbone of the user's own: built, refused, planned and initialised by its rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from streamtrain.config.load import build
from streamtrain.config.model import ModelConfig
from streamtrain.config.tree import Config
from streamtrain.errors import UserCodeError
from streamtrain.model.factory import build_backbone
from streamtrain.model.initialise import initial_value, initialise
from streamtrain.planning.memory import plan
from streamtrain.planning.shapes import block_shapes, parameter_shapes
from streamtrain.training.ssl_model import SSLModel

# blocks with heads of 64 features, as the presets have
HEAD = {"prototypes": 64, "hidden": 32, "bottleneck": 16}


def config(factory: str | None, **model: Any) -> Config:
    given = {"dim": 128, "depth": 2, "num_heads": 2, "patch_size": 8, "layerscale": 0.5, **model}
    return build({
        "model": {**given, "factory": factory and f"own_code:{factory}"},
        "objective": {"global_loss": {"head": HEAD}, "patch_loss": {"head": HEAD}},
        "crops": {"global_size": 32, "local_size": 16},
    })  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "own_code .* has no nothing"),
        ("invert", r"invert is called with \(config, checkpointing, view_groups, offload\), but too many"),
        ("not_a_backbone", "returns a Linear, not a subclass of streamtrain.model.vit.VisionTransformer"),
        ("Shallow", "has 1 blocks, but model.depth is 2"),
        ("OtherBlocks", "has a block of type Linear, not a subclass of streamtrain.model.layers.Block"),
        ("WithParameter", "has the parameter factor itself; move it to a submodule"),
        ("WithBuffer", "has the buffer norm.mean, but only parameters are saved"),
        ("Frozen", "has the parameter norm.weight without gradient"),
        ("Tied", "has a parameter under two names"),
        ("Failing", r"cannot be built: AttributeError: 'Failing' object has no .*own_code.py, line 1\d\d\)"),
    ],
)
def test_networks_that_cannot_be_trained(name: str, message: str) -> None:
    with pytest.raises(UserCodeError, match=f"^model.factory=own_code:{name}:? .*{message}") as error:
        build_backbone(config(name).model)
    assert "\n" not in str(error.value)


def test_the_plan_has_the_parameters_of_the_network() -> None:
    own, plain = config("Backbone"), config(None)
    expected = {name: tuple(value.shape) for name, value in SSLModel(own).named_parameters()}
    assert list(parameter_shapes(own).items()) == list(expected.items())
    added = {name for name in block_shapes(own.model) if name not in block_shapes(plain.model)}
    assert added == {"gate.weight", "gate.bias", "gate_norm.weight", "gate_norm.bias"}
    more = 2 * (128 * 128 + 3 * 128)
    assert plan(own, 2).num_parameters == plan(plain, 2).num_parameters + more


def test_initial_values_come_from_the_network_then_from_the_rules() -> None:
    own = config("Backbone")
    model, plain = SSLModel(own), SSLModel(config(None))
    for network, seed in ((model, 3), (plain, 3)):
        initialise(network, own.model if network is model else config(None).model, seed)
    values, rules = dict(model.named_parameters()), dict(plain.named_parameters())
    assert all(torch.equal(values[name], rules[name]) for name in rules)
    gates = [values[f"backbone.blocks.{index}.gate.weight"] for index in range(2)]
    assert all(0.9 < gate.std() < 1.1 for gate in gates) and not torch.equal(*gates)
    assert (values["backbone.blocks.1.gate_norm.weight"] == 1).all()
    assert (values["backbone.blocks.1.gate.bias"] == 0).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WithoutRule", "no rule for the initial value of the parameter blocks.0.gate_norm.weight; return it from"),
        ("WrongValue", r"parameter embedding.cls_token must be a tensor \[1, 128\], not \[2, 2, 2\]"),
    ],
)
def test_initial_values_that_are_missing_or_wrong(name: str, message: str) -> None:
    own = config(name)
    with pytest.raises(UserCodeError, match=f"^model.factory=own_code:{name}: .*{message}"):
        initialise(SSLModel(own), own.model, seed=3)


def test_a_vector_called_weight_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="no rule for the initial value"):
        initial_value("backbone.blocks.0.gate_norm.weight", (8,), ModelConfig(), 0)


def test_checkpointing_and_chunks_change_nothing() -> None:
    """A subclass of a block is recomputed like the block."""
    own = config("Backbone", drop_path=0.0).model
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in ("none", "selective", "block"):
        model = build_backbone(own, checkpointing)
        holder = torch.nn.ModuleDict({"backbone": model})
        for name, parameter in holder.named_parameters():
            parameter.data.copy_(initial_value(name, parameter.shape, own, 0, model))
        features = model([images])[0]
        features.patches.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        with torch.no_grad():
            torch.testing.assert_close(model([images], chunk=2)[0].cls, features.cls)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
