from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from streamtrain.evaluation.retrieval import ZOOM, match_patches, second_view


def test_position_features_match_their_origin() -> None:
    """A patch's feature is the mean position of its pixels in the first view."""
    side, patch = 64, 8
    ramp = np.linspace(0, 255, side)
    image = np.stack([*np.meshgrid(ramp, ramp), np.full((side, side), 90.0)], -1)
    images = torch.from_numpy(np.rint(image).astype(np.uint8))[None].repeat(2, 1, 1, 1)

    def features(views: torch.Tensor) -> torch.Tensor:
        patches = views.float().unfold(1, patch, patch).unfold(2, patch, patch).mean((-1, -2)).flatten(1, 2)
        x, y = patches[..., 0] / 255 * 3, patches[..., 1] / 255 * 3
        return torch.stack([x.cos(), x.sin(), y.cos(), y.sin()], -1)

    assert match_patches(features(images), features(second_view(images))).all()
    generator = torch.Generator().manual_seed(0)
    by_chance = match_patches(*(torch.randn(50, 64, 8, generator=generator) for _ in range(2))).double().mean()
    assert 2 / 64 < by_chance < 12 / 64


def test_second_view_is_the_mirrored_middle() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (view,) = second_view(torch.from_numpy(pixels)[None]).numpy()
    middle = Image.fromarray(pixels[4:36, 4:36]).resize((40, 40), Image.Resampling.BICUBIC)
    assert view.shape == (40, 40, 3) and ZOOM == 40 / 32
    mirrored = np.asarray(middle)[:, ::-1].astype(float)
    assert np.corrcoef(view.astype(float).ravel(), mirrored.ravel())[0, 1] > 0.98
