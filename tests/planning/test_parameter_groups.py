"""Every parameter of every recipe's network gets its learning rate multiplier and weight decay."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from streamtrain.config.load import load_config, preset_folders
from streamtrain.config.tree import Config
from streamtrain.model.layers import LayerScale
from streamtrain.planning.parameter_groups import GroupRule, rule_of
from streamtrain.training.ssl_model import SSLModel

RECIPES = sorted(path.name for path in preset_folders()[0].glob("*.yaml"))
DECAY, PATCH_EMBED = 0.9, 0.2
VARIANTS = [(), ("objective.patch_loss.kind=cosine", "model.untied_norms=local_cls", "model.mlp=swiglu")]


def build(recipe: str, variant: tuple[str, ...]) -> tuple[Config, SSLModel]:
    rates = (f"optim.layer_decay={DECAY}", f"optim.patch_embed_lr={PATCH_EMBED}")
    config = load_config(recipe, (*rates, *variant))
    with torch.device("meta"):
        return config, SSLModel(config)


def expected_rules(model: SSLModel) -> dict[str, GroupRule]:
    """Return the rules by the modules that own the parameters, not by names."""
    depth = len(model.backbone.blocks)
    rules = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            in_backbone = path.startswith("backbone")
            multiplier = 1.0
            if path == "backbone.embedding":
                multiplier = DECAY ** (depth + 1)
            elif path == "backbone.embedding.projection":
                multiplier = DECAY ** (depth + 1) * PATCH_EMBED
            elif block := re.match(r"backbone\.blocks\.(\d+)", path):
                multiplier = DECAY ** (depth - int(block.group(1)))
            is_vector = isinstance(module, nn.LayerNorm | LayerScale) or name.endswith(".bias")
            is_last_layer = re.fullmatch(r"(global|patch)_head\.prototypes", path) is not None
            assert is_vector == (parameter.dim() == 1), name
            rules[name] = GroupRule(multiplier, not is_vector, is_last_layer, in_backbone)
    return rules


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "variant"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_rules_of_all_parameters(recipe: str, variant: tuple[str, ...]) -> None:
    config, model = build(recipe, variant)
    rules = {name: rule_of(name, p.dim(), config.model.depth, config.optim) for name, p in model.named_parameters()}
    expected = expected_rules(model)
    assert rules.keys() == expected.keys()
    for name, rule in rules.items():
        want = expected[name]
        assert rule.lr_factor == pytest.approx(want.lr_factor, rel=1e-12), name
        assert (rule.decays, rule.last_layer, rule.backbone) == (want.decays, want.last_layer, want.backbone), name


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("backbone.embedding.projection.weight", GroupRule(DECAY**13 * PATCH_EMBED, True, False, True)),
        ("backbone.embedding.projection.bias", GroupRule(DECAY**13 * PATCH_EMBED, False, False, True)),
        ("backbone.embedding.cls_token", GroupRule(DECAY**13, True, False, True)),
        ("backbone.blocks.0.attention.qkv.weight", GroupRule(DECAY**12, True, False, True)),
        ("backbone.blocks.11.attention.qkv.bias", GroupRule(DECAY, False, False, True)),
        ("backbone.blocks.11.scale2.gamma", GroupRule(DECAY, False, False, True)),
        ("backbone.norm.weight", GroupRule(1.0, False, False, True)),
        ("global_head.projection.layers.0.weight", GroupRule(1.0, True, False, False)),
        ("global_head.projection.layers.0.bias", GroupRule(1.0, False, False, False)),
        ("patch_head.prototypes.weight", GroupRule(1.0, True, True, False)),
    ],
)
def test_examples_of_vits16(name: str, rule: GroupRule) -> None:
    config, model = build("vits16.yaml", ())
    dims = {name: parameter.dim() for name, parameter in model.named_parameters()}
    actual = rule_of(name, dims[name], config.model.depth, config.optim)
    assert (actual.decays, actual.last_layer, actual.backbone) == (rule.decays, rule.last_layer, rule.backbone)
    assert actual.lr_factor == pytest.approx(rule.lr_factor, rel=1e-12)
