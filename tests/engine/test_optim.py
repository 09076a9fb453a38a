"""Layer-wise rates: who learns how fast, and who decays."""

from __future__ import annotations

import pytest
import torch

from streamtrain.config.engine import OptimConfig
from streamtrain.engine.optim import parameter_groups, set_rates
from streamtrain.planning.parameter_groups import GroupRule, rule_of

CONFIG = OptimConfig(layer_decay=0.5, patch_embed_lr=0.2)


@pytest.mark.parametrize(
    ("name", "dims", "rule"),
    [
        ("backbone.embedding.projection.weight", 2, GroupRule(0.5**5 * 0.2, True, False, True)),
        ("backbone.embedding.cls_token", 2, GroupRule(0.5**5, True, False, True)),
        ("backbone.blocks.0.attention.qkv.weight", 2, GroupRule(0.5**4, True, False, True)),
        ("backbone.blocks.3.attention.qkv.bias", 1, GroupRule(0.5, False, False, True)),
        ("backbone.norm.weight", 1, GroupRule(1.0, False, False, True)),
        ("global_head.mlp.0.weight", 2, GroupRule(1.0, True, False, False)),
        ("global_head.prototypes.weight", 2, GroupRule(1.0, True, True, False)),
    ],
)
def test_rules_follow_from_the_name(name: str, dims: int, rule: GroupRule) -> None:
    assert rule_of(name, dims, 4, CONFIG) == rule


def test_every_parameter_is_in_one_group_and_frozen_prototypes_do_not_move() -> None:
    names = ["backbone.blocks.0.mlp.weight", "backbone.norm.weight", "head.prototypes.weight", "head.mlp.weight"]
    named = [(name, torch.nn.Parameter(torch.ones(2, 2))) for name in names]
    groups = parameter_groups(named, 1, CONFIG)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for _, p in named)
    set_rates(groups, 1e-3, 0.1, last_layer_frozen=True)
    by_name = {id(p): group for group in groups for p in group["params"]}
    assert [by_name[id(p)]["lr"] for _, p in named] == [5e-4, 1e-3, 0.0, 1e-3]
    set_rates(groups, 1e-3, 0.1, last_layer_frozen=False)
    assert by_name[id(named[2][1])]["lr"] == 1e-3
    set_rates(groups, 1e-3, 0.1, last_layer_frozen=False, backbone_frozen=True)
    assert [by_name[id(p)]["lr"] for _, p in named] == [0.0, 0.0, 1e-3, 1e-3]
