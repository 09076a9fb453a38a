from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_backbone import tiny_backbone

from streamtrain.config.model import ModelConfig
from streamtrain.data.batch import normalise
from streamtrain.errors import StreamtrainError
from streamtrain.evaluation.canvas import Tile, colour_bar, compose, mark, viridis
from streamtrain.evaluation.maps import (
    cls_attention,
    fit_to_patches,
    foreground_components,
    map_size,
    patch_features,
    principal_components,
    similarity_maps,
)
from streamtrain.model.initialise import initialise
from streamtrain.model.vit import VisionTransformer
from streamtrain.ops.cpu.build import set_enabled


def test_patch_features_lie_where_the_patches_lie() -> None:
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


def test_attention_of_cls_is_that_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    found = cls_attention(backbone.model, image, backbone.config.mean, backbone.config.std)
    assert found.shape == (2, 3, 5) and (found >= 0).all() and (found.sum((1, 2)) < 1).all()
    # The model's own attention: where the values of patches are 1 and all others 0, the output is the share of patches.
    received: list[torch.Tensor] = []
    attend = F.scaled_dot_product_attention

    def probe(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        of_patches = torch.zeros_like(value)
        of_patches[:, :, 5:] = 1
        received.append(attend(query, key, of_patches)[0, :, 0, 0])
        return attend(query, key, value)

    monkeypatch.setattr(F, "scaled_dot_product_attention", probe)
    pixels = torch.from_numpy(np.array(image))[None]
    inputs = normalise(pixels, backbone.config.mean, backbone.config.std, torch.float32)
    backbone.model.forward_features(inputs)
    np.testing.assert_allclose(received[-1], found.sum((1, 2)), rtol=1e-5)


def test_any_image_becomes_whole_patches() -> None:
    assert fit_to_patches(Image.new("RGB", (300, 200)), 64, 8).size == (96, 64)
    assert fit_to_patches(Image.new("RGB", (10, 4000)), 32, 16).size == (32, 12800)
    assert fit_to_patches(Image.new("RGB", (50, 50)), 8, 16).size == (16, 16)


def test_similarity_is_cosine_and_one_at_the_patch() -> None:
    features = [F.normalize(torch.randn(4, 6, 8), dim=-1), F.normalize(torch.randn(3, 2, 8), dim=-1)]
    own, other = similarity_maps(features, (2, 5))
    assert own.shape == (4, 6) and other.shape == (3, 2)
    assert np.isclose(own[2, 5], 1.0) and own.max() <= 1.0 + 1e-6
    assert np.isclose(other[1, 1], float(features[0][2, 5] @ features[1][1, 1]))
    for patch in ((4, 0), (0, 6), (-1, 0)):
        with pytest.raises(StreamtrainError, match="outside"):
            similarity_maps(features, patch)


def test_components_are_the_directions_of_most_variance_and_turn_no_somersaults() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(200, 3, generator=generator) ** 2 * torch.tensor([9.0, 4.0, 1.0])
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][:3]
    features = (hidden @ axes + 5.0).unflatten(0, (10, 20))
    (found,) = principal_components([features])
    assert found.shape == (10, 20, 3) and found.min() == 0.0 and found.max() == 1.0
    for index in range(3):
        # Middle values only, the ends being clipped; skewed to the right, so bright is more.
        correlation = np.corrcoef(found[..., index].ravel(), hidden[:, index].numpy())[0, 1]
        assert correlation > 0.95
    parts = principal_components([features[:4], features[4:]])
    np.testing.assert_allclose(np.concatenate(parts), found, atol=1e-5)


def test_the_foreground_is_told_from_the_ground_and_coloured_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 12, 8, generator=generator) * 0.1
    features[..., 0] -= 5.0
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[3:9, 4:8] = True
    features[inside] += torch.tensor([10.0, *torch.zeros(7).tolist()])
    (found,) = foreground_components([features])
    assert np.array_equal(found.any(-1), inside.numpy()) and found.max() == 1.0
    # the middle is the foreground, whichever side of the component it lies on
    (other,) = foreground_components([-features])
    assert np.array_equal(other.any(-1), inside.numpy())


def test_maps_have_patches_enough_to_show_something() -> None:
    assert map_size(224, 16) == 448 and map_size(48, 8) == 192


def test_a_flat_image_has_components_all_the_same() -> None:
    (found,) = principal_components([torch.ones(5, 5, 8)])
    assert np.isfinite(found).all()


def test_colours_rise_in_lightness() -> None:
    colours = viridis(np.linspace(0, 1, 101)).astype(float)
    lightness = colours @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > -1.0).all() and lightness[-1] - lightness[0] > 150
    assert viridis(np.array([[-1.0, 2.0]])).tolist() == [[[68, 1, 84], [253, 231, 37]]]


def test_mark_and_page() -> None:
    marked = np.asarray(mark(Image.new("RGB", (80, 40), (0, 0, 255)), (1, 3), (2, 4)))
    red = np.argwhere((marked == (230, 30, 40)).all(-1))
    np.testing.assert_allclose(red.mean(0), (30, 70), atol=1.5)
    page = compose("Title", "subtitle", [[Tile(Image.new("RGB", (60, 40), (1, 2, 3)), "a name too long " * 9)] * 2])
    assert ((np.asarray(page) == (1, 2, 3)).all(-1)).sum() == 2 * 60 * 40
    assert colour_bar(-0.25, 1.0, 200, "scale").size == (200, 40)


def test_attention_does_not_depend_on_the_cpu_kernels() -> None:
    """A block whose widths suit the kernels never calls its attention module."""
    config = ModelConfig.model_validate({"dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8})
    model = VisionTransformer(config)
    initialise(model, config, 0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    with_kernels = cls_attention(model, image, (0.5,) * 3, (0.5,) * 3)
    set_enabled(False)
    try:
        without = cls_attention(model, image, (0.5,) * 3, (0.5,) * 3)
    finally:
        set_enabled(True)
    np.testing.assert_allclose(with_kernels, without, rtol=1e-4)
