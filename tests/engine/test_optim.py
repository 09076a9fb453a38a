"""Parameter groups of the optimiser and their rates."""

from __future__ import annotations

import pytest
import torch

from streamtrain.config.load import build
from streamtrain.engine.optim import parameter_groups, set_rates
from streamtrain.training.ssl_model import SSLModel

CONFIG = build(
    {
        "model": {"patch_size": 8, "dim": 16, "depth": 2, "num_heads": 2},
        "crops": {"global_size": 32, "local_size": 16},
        "optim": {"layer_decay": 0.5, "patch_embed_lr": 0.2},
    }
)


def test_rates_of_every_group_and_frozen_parts() -> None:
    with torch.device("meta"):
        named = list(SSLModel(CONFIG).named_parameters())
    groups = parameter_groups(named, CONFIG.model.depth, CONFIG.optim)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for _, p in named)
    names = {id(parameter): name for name, parameter in named}

    def rates(**frozen: bool) -> dict[str, tuple[float, float]]:
        set_rates(groups, 1e-3, 0.1, **{"last_layer_frozen": False, **frozen})
        return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    usual = rates()
    assert usual["backbone.embedding.projection.weight"] == (pytest.approx(1e-3 * 0.5**3 * 0.2), 0.1)
    assert usual["backbone.blocks.1.attention.qkv.bias"] == (5e-4, 0.0)
    assert usual["global_head.prototypes.weight"] == usual["patch_head.projection.layers.0.weight"] == (1e-3, 0.1)
    last_layers = {"global_head.prototypes.weight", "patch_head.prototypes.weight"}
    for frozen, stopped in (
        ({"last_layer_frozen": True}, last_layers),
        ({"backbone_frozen": True}, {name for name in usual if name.startswith("backbone.")}),
    ):
        changed = rates(**frozen)
        assert {name for name, (lr, _) in changed.items() if lr == 0.0} == stopped
        assert all(changed[name] == usual[name] for name in usual.keys() - stopped)
