"""The torch-free shapes equal the real network's, in order, for every recipe."""

from __future__ import annotations

import pytest
import torch

from streamtrain.config.load import load_config, preset_folders
from streamtrain.planning.shapes import block_shapes, parameter_shapes, trained_shapes
from streamtrain.training.ssl_model import SSLModel

RECIPES = sorted(path.name for path in preset_folders()[0].glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "objective.patch_loss.kind=cosine",
            "model.key_bias=false",
            "model.lora={rank: 2, targets: [qkv, mlp], blocks: 3}",
        ),
        (
            "data.channels=13",
            "crops.mean=[0.5]",
            "crops.std=[0.2]",
            "crops.jitter.probability=0",
            "crops.grey=0",
            "crops.solarize.global_probability=[0]",
        ),
    ],
)
def test_names_order_and_shapes_equal_the_network(recipe: str, overrides: tuple[str, ...]) -> None:
    config = load_config(recipe, overrides)
    with torch.device("meta"):
        model = SSLModel(config)
    expected = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert list(parameter_shapes(config).items()) == expected
    block = model.backbone.blocks[-1]
    assert list(block_shapes(config.model).items()) == [(n, tuple(p.shape)) for n, p in block.named_parameters()]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trained_shapes(config)) == trained


def test_giant_has_the_published_size() -> None:
    def millions(part: str) -> int:
        numels = (torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(part))
        return round(sum(numels) / 1e6)

    shapes = parameter_shapes(load_config("giant.yaml"))
    assert (millions("backbone."), millions("global_head."), millions("patch_head.")) == (6716, 239, 73)
