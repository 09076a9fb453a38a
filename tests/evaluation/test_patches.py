"""Patch features of a batch, and their upsampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mapped_folders import mapped_folder
from tiny_backbone import tiny_backbone

from shards.format.pixels import RGB
from streamtrain.evaluation.label_maps import CLASS_IDS, open_mapped
from streamtrain.evaluation.patches import PatchNetwork, at_pixels, feature_batches, upsampled


def test_upsampling_is_that_of_torch() -> None:
    values = torch.randn(25, 7, generator=torch.Generator().manual_seed(0))
    grid = values.T.reshape(1, 7, 5, 5)
    expected = F.interpolate(grid, size=40, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    torch.testing.assert_close(upsampled(values, 5, 40), expected)
    torch.testing.assert_close(upsampled(values, 5, 40, range(8, 11)), expected[8:11])
    pixels = torch.tensor([0, 39, 777, 1599])
    torch.testing.assert_close(at_pixels(values, 5, 40, pixels), expected.flatten(0, 1)[pixels])


def test_batches_have_the_features_of_each_usable_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = tiny_backbone()
    config, folder = backbone.config, mapped_folder(tmp_path, 10)
    mapped = open_mapped(folder / "images", folder / "masks", CLASS_IDS, RGB)
    (folder / "images" / "a" / "1.png").write_bytes(b"damage")
    network = PatchNetwork(backbone.model, 8, 32, 32, config.mean, config.std, config.value_range, "cpu", batch_size=4)
    batches = list(feature_batches(network, mapped))
    assert [indices for indices, _, _ in batches] == [[0, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert "1 of 10 images" in caplog.text and "1.png" in caplog.text
    usable = [index for indices, _, _ in batches for index in indices]
    inputs = backbone.preprocess([mapped.images.decode(index) for index in usable])
    features = torch.cat([each for _, each, _ in batches])
    with torch.no_grad():
        torch.testing.assert_close(features, backbone.model.forward_features(inputs).patches, rtol=1e-4, atol=1e-4)


def test_pixels_of_a_patch_are_its_features() -> None:
    crops = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))
    network = PatchNetwork(None, 8, 16, 16, (0.0,) * 3, (1.0,) * 3, ((0.0, 255.0),), "cpu")
    features = network.features(crops)
    assert features.shape == (2, 4, 192)
    second = crops[1, :8, 8:].permute(2, 0, 1).flatten() / 255
    torch.testing.assert_close(features[1, 1], second)
