from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_backbone import tiny_backbone

from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.maps import (
    cls_attention,
    fit_to_patches,
    foreground_components,
    map_size,
    patch_features,
    principal_components,
    similarity_maps,
)
from streamtrain.interop.hf import hf_config
from streamtrain.interop.load import Backbone
from streamtrain.interop.naming import to_hf
from streamtrain.ops.cpu import build


def test_patch_features_are_at_the_positions_of_the_patches() -> None:
    backbone = tiny_backbone()
    pixels = np.full((32, 56, 3), 90, np.uint8)
    changed = pixels.copy()
    changed[8:16, 40:48] = 250  # the patch at row 1, column 5
    first, second = (
        patch_features(backbone.model, Image.fromarray(image), backbone.config.mean, backbone.config.std)
        for image in (pixels, changed)
    )
    assert first.shape == (4, 7, 32)
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(4, 7))
    difference = (first - second).norm(dim=-1)
    assert divmod(int(difference.argmax()), 7) == (1, 5)


def attention_of_transformers(backbone: Backbone, image: Image.Image) -> np.ndarray:
    """Return the CLS token's attention to patches in the last block of the same network in transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    described = transformers.DINOv3ViTConfig(**hf_config(backbone.config), attn_implementation="eager")
    reference = transformers.DINOv3ViTModel(described).eval()
    saved = to_hf(backbone.model.state_dict())
    reference.load_state_dict({name: saved[name.removeprefix("model.")] for name in reference.state_dict()})
    with torch.no_grad():
        attentions = reference(backbone.preprocess(image), output_attentions=True).attentions
    return attentions[-1][0, :, 0, backbone.model.num_prefix :].unflatten(1, (4, 4)).numpy()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    "fields", [{}, {"depth": 1, "key_bias": True}, {"dim": 128, "num_heads": 2}, {"qkv_bias": False}]
)
def test_attention_equals_transformers(fields: dict[str, Any], kernels: bool) -> None:
    backbone = tiny_backbone(**fields)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    # the attention of a fresh network is close to uniform
    for name, value in backbone.model.named_parameters():
        if name.endswith("qkv.weight"):
            value.mul_(10)
    expected = attention_of_transformers(backbone, image)
    build.set_enabled(kernels)
    try:
        maps = cls_attention(backbone.model, image, backbone.config.mean, backbone.config.std)
    finally:
        build.set_enabled(True)
    assert maps.shape == (2, 4, 4) and (maps.sum((1, 2)) < 1).all() and expected.std() > 5e-3
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernels", [False, True])
def test_attention_in_bf16_is_close_to_fp32(kernels: bool) -> None:
    backbone = tiny_backbone(dim=128)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    expected = cls_attention(backbone.model, image, backbone.config.mean, backbone.config.std)
    build.set_enabled(kernels)
    try:
        maps = cls_attention(backbone.model.bfloat16(), image, backbone.config.mean, backbone.config.std)
    finally:
        build.set_enabled(True)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, expected, rtol=0.1, atol=1e-3)


def test_images_are_resized_to_whole_patches() -> None:
    assert fit_to_patches(Image.new("RGB", (300, 200)), 64, 8).size == (96, 64)
    # extreme shapes are compressed, so that they take no more memory than eight squares
    assert fit_to_patches(Image.new("RGB", (10, 4000)), 32, 16).size == (32, 256)
    assert fit_to_patches(Image.new("RGB", (300, 1)), 448, 16).size == (3584, 448)
    assert fit_to_patches(Image.new("RGB", (50, 50)), 8, 16).size == (16, 16)
    assert fit_to_patches(Image.new("RGB", (1, 99)), 2048, 16).size == (2048, 16384)
    with pytest.raises(StreamtrainError, match="--size 1000000 makes an input of 1000000x"):
        fit_to_patches(Image.new("RGB", (50, 50)), 10**6, 8)


def test_similarity_is_cosine_and_one_at_the_patch() -> None:
    features = [F.normalize(torch.randn(4, 6, 8), dim=-1), F.normalize(torch.randn(3, 2, 8), dim=-1)]
    own, other = similarity_maps(features, (2, 5))
    assert own.shape == (4, 6) and other.shape == (3, 2)
    assert np.isclose(own[2, 5], 1.0) and own.max() <= 1.0 + 1e-6
    assert np.isclose(other[1, 1], float(features[0][2, 5] @ features[1][1, 1]))
    for patch in ((4, 0), (0, 6), (-1, 0)):
        with pytest.raises(StreamtrainError, match="outside"):
            similarity_maps(features, patch)


def test_components_are_the_directions_of_most_variance_with_a_fixed_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(200, 3, generator=generator) ** 2 * torch.tensor([9.0, 4.0, 1.0])
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:3]
    features = (hidden @ axes + 5.0).unflatten(0, (10, 20))
    (found,) = principal_components([features])
    assert found.shape == (10, 20, 3) and found.min() == 0.0 and found.max() == 1.0
    for index in range(3):
        # the ends are clipped; the values are skewed to the right, so the long tail is bright
        correlation = np.corrcoef(found[..., index].ravel(), hidden[:, index].numpy())[0, 1]
        assert correlation > 0.95
    parts = principal_components([features[:4], features[4:]])
    np.testing.assert_allclose(np.concatenate(parts), found, atol=1e-5)


def test_foreground_is_separated_and_coloured_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 12, 8, generator=generator) * 0.1
    features[..., 0] -= 5.0
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[3:9, 4:8] = True
    features[inside] += torch.tensor([10.0, *torch.zeros(7).tolist()])
    (found,) = foreground_components([features])
    assert np.array_equal(found.any(-1), inside.numpy()) and found.max() == 1.0
    # the foreground does not depend on the sign of the component
    (other,) = foreground_components([-features])
    assert np.array_equal(other.any(-1), inside.numpy())


def test_map_size_has_at_least_24_patches() -> None:
    assert map_size(224, 16) == 448 and map_size(48, 8) == 192


def test_components_of_a_uniform_image_are_finite() -> None:
    (found,) = principal_components([torch.ones(5, 5, 8)])
    assert np.isfinite(found).all()
