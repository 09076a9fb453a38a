"""Networks of any channels: exports, their preprocessing, and patch embeddings that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data.test_channels import PLAIN
from tiny_backbone import CROPS, TINY, tiny_weights

from streamtrain.config.load import build
from streamtrain.errors import StreamtrainError
from streamtrain.interop.export import export_backbone
from streamtrain.interop.load import Backbone, load_backbone, load_untrained
from streamtrain.interop.load_pretrained import load_pretrained_backbone


def backbone_of(channels: int, dtype: str, **crops: object) -> Backbone:
    values = {"mean": [0.1 * (1 + n) for n in range(channels)], "std": [0.5] * channels}
    sections = {"data": {"channels": channels, "dtype": dtype}, "model": TINY, "crops": {**CROPS, **PLAIN, **values}}
    return load_untrained(build({**sections, "crops": sections["crops"] | crops}))


@pytest.mark.parametrize(
    ("channels", "dtype", "ranges"),
    [
        (1, "uint8", [0, 255]),
        (3, "uint8", [10, 200]),
        (4, "uint16", [100, 10000]),
        (4, "uint16", [[100, 10000], [0, 5000], [2000, 2500], [0, 65535]]),
        (13, "float32", [-10, 200]),
    ],
)
def test_exports_give_the_same_features(tmp_path: Path, channels: int, dtype: str, ranges: list) -> None:
    ours = backbone_of(channels, dtype, value_range=ranges)
    low, high = np.broadcast_to(np.array(ranges, np.float64), (channels, 2)).T
    image = np.random.default_rng(0).uniform(low, high, (32, 32, channels)).astype(dtype)
    pixels = ours.preprocess(image)
    expected = ours.forward_features(pixels).cls
    by_hand = ((image - low) / (high - low) - [0.1 * (1 + n) for n in range(channels)]) / 0.5
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), by_hand, atol=1e-5)
    for to in ("hf", "safetensors", "timm"):
        export_backbone(ours, to, tmp_path / to)
        theirs = load_backbone(tmp_path / to)
        assert theirs.config.pixels == ours.config.pixels and torch.equal(theirs.preprocess(image), pixels)
        assert torch.allclose(theirs.forward_features(pixels).cls, expected, atol=1e-6)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_channels"] == channels
    stated = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    values = image / 255 if dtype == "uint8" else image.astype(np.float64)
    assert np.allclose((values - stated["mean"]) / stated["std"], by_hand)
    if channels != 3:
        unit = "8-bit values divided by 255" if dtype == "uint8" else f"stored values ({dtype}, not scaled)"
        assert stated["description"].endswith(unit) and stated["first_conv"] is None
    from transformers import AutoImageProcessor, AutoModel

    processed = AutoImageProcessor.from_pretrained(tmp_path / "hf")(
        image, input_data_format="channels_last", return_tensors="pt"
    )["pixel_values"]
    assert torch.allclose(processed, pixels, atol=1e-5)
    pooled = AutoModel.from_pretrained(tmp_path / "hf")(processed).pooler_output
    assert torch.allclose(pooled, expected, atol=1e-5)


def test_arrays_may_have_their_channels_first() -> None:
    for channels, dtype in ((1, "float32"), (3, "uint8"), (4, "uint16")):
        ours = backbone_of(channels, dtype)
        images = np.random.default_rng(0).integers(0, 200, (2, 40, 32, channels)).astype(dtype)
        expected, first = ours.preprocess(images), np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        given = [first, torch.from_numpy(first.astype(dtype)), images.astype(images.dtype.newbyteorder(">"))]
        assert all(torch.equal(ours.preprocess(each), expected) for each in given)
        assert torch.equal(ours.preprocess(first[0]), expected[:1])
        if channels == 1:
            assert torch.equal(ours.preprocess(images[0, ..., 0]), expected[:1])


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    ours = backbone_of(4, "uint16")
    for array, message in (
        (np.zeros((8, 8, 3), np.uint16), r"an array of shape \[8, 8, 3\] is not an image of 4 channels"),
        (np.zeros((8, 8, 4), np.uint8), "an image array has values of uint8, the network takes 4 channels of uint16"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.preprocess(array)
    with pytest.raises(ValueError, match="has NaN or infinite values"):
        backbone_of(1, "float32").preprocess(np.full((8, 8), np.nan, np.float32))
    shapes = {name: value.shape for name, value in ours.model.state_dict().items()}
    with pytest.raises(StreamtrainError, match=r"needs \[32, 256\]"):
        with load_pretrained_backbone(tiny_weights(tmp_path / "rgb"), shapes):
            pass
