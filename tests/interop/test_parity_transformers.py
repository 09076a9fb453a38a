"""Every preset, at reduced depth, computes the features of transformers' DINOv3 at several image sizes."""

from __future__ import annotations

import pytest
import torch
from converted import own_names

from streamtrain.config.crops import CropsConfig
from streamtrain.config.model import PRESETS, ModelConfig
from streamtrain.interop.folder import BackboneConfig
from streamtrain.interop.hf import hf_config
from streamtrain.interop.naming import to_hf
from streamtrain.model.vit import VisionTransformer

SIZES = [(224, 224), (256, 256), (512, 512), (192, 320)]
# two blocks of these take seconds per size on a CPU
WIDE = {"vit7b16"}
# the smaller presets and vitg16 have the same parts
SLOW = WIDE | {"vitl16", "vitl16plus", "vith16plus"}


def backbone(preset: str, depth: int) -> tuple[VisionTransformer, BackboneConfig]:
    """Return a preset with random LayerScale, norms and biases, so that every parameter affects the features."""
    config = ModelConfig(preset=preset, depth=depth, drop_path=0.0)
    model = VisionTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if name.endswith("gamma"):
            value.uniform_(0.3, 0.7, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() == 2 and "token" not in name:
            value.normal_(0.0, value.shape[1] ** -0.5, generator=generator)
        else:
            value.normal_(0.0, 0.2, generator=generator)
    return model, BackboneConfig(model=config, image_size=CropsConfig().global_size.height)


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PRESETS]
)
def test_features_equal_transformers_at_every_size(preset: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, config = backbone(preset, depth=1 if preset in WIDE else 2)
    reference = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**hf_config(config))).eval()
    saved = to_hf(model.state_dict())
    # the live model has its blocks one level deeper than its files
    state = {name: saved[name.removeprefix("model.")] for name in reference.state_dict()}
    reference.load_state_dict(state, assign=True)
    back = own_names(state)
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items() if name in back)
    generator = torch.Generator().manual_seed(1)
    for size in SIZES:
        images = torch.randn(1, 3, *size, generator=generator)
        ours = model.forward_features(images)
        with torch.no_grad():
            theirs = reference(images).last_hidden_state
        tokens = torch.cat([ours.cls[:, None], ours.registers, ours.patches], dim=1)
        assert tokens.std() > 0.5
        torch.testing.assert_close(tokens, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, size=size: f"{size}: {text}")
