"""RGB weights in networks of other channels: equal tokens of grey images, ignored extra channels, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_backbone import tiny_backbone, tiny_weights

from streamtrain.config.init import ChannelRule
from streamtrain.errors import StreamtrainError
from streamtrain.interop.export import export_backbone
from streamtrain.interop.load_pretrained import PROJECTION, load_pretrained_backbone
from streamtrain.interop.patch_embedding import RgbAdaptation


def shapes_of(channels: int, patch_size: int = 8, dim: int = 32) -> dict[str, torch.Size]:
    """Return the names and shapes of a backbone for images of ``channels`` channels."""
    shapes = {name: value.shape for name, value in tiny_backbone(dim=dim).model.state_dict().items()}
    return shapes | {PROJECTION: torch.Size([dim, channels * patch_size**2])}


def tokens(weight: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the patch tokens [images, dim] of images [images, channels, p, p] of one patch."""
    return images.flatten(1).double() @ weight.double().T


@given(st.sampled_from(["repeat", "mean"]), st.integers(1, 40), st.integers(0, 99))
def test_grey_images_keep_their_tokens(rule: ChannelRule, channels: int, seed: int) -> None:
    if rule == "repeat":
        channels = max(channels, 3)
    draw = torch.Generator().manual_seed(seed)
    weight, grey = torch.randn(5, 3 * 16, generator=draw), torch.randn(2, 1, 4, 4, generator=draw)
    adapted = RgbAdaptation(rule, channels).adapt(weight)
    assert adapted.shape == (5, channels * 16) and adapted.dtype == torch.float32
    expected = tokens(weight, grey.repeat(1, 3, 1, 1))
    torch.testing.assert_close(tokens(adapted, grey.repeat(1, channels, 1, 1)), expected, rtol=0, atol=1e-5)


@given(st.integers(3, 40), st.integers(0, 99))
def test_zero_extra_gives_the_tokens_of_the_first_three_channels(channels: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight, images = torch.randn(5, 3 * 16, generator=draw), torch.randn(2, channels, 4, 4, generator=draw)
    found = tokens(RgbAdaptation("zero_extra", channels).adapt(weight), images)
    torch.testing.assert_close(found, tokens(weight, images[:, :3]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["safetensors", "hf", "timm"])
def test_weights_of_every_family_are_adapted_as_they_are_read(tmp_path: Path, kind: str) -> None:
    rgb = tiny_backbone()
    export_backbone(rgb, kind, tmp_path / kind)
    with load_pretrained_backbone(tmp_path / kind, shapes_of(5), adaptation=RgbAdaptation("repeat", 5)) as (
        read,
        report,
    ):
        assert not report.reshaped and "patch embedding: RGB to 5 channels (repeat)" in report.text()
        kernels, found = rgb.model.state_dict()[PROJECTION].unflatten(1, (3, -1)), read(PROJECTION)
        assert found is not None
        copies = torch.tensor([2, 2, 1, 2, 2])[:, None]
        assert torch.equal(found.unflatten(1, (5, -1)), kernels[:, [0, 1, 2, 0, 1]] / copies)


def test_only_the_channels_may_differ(tmp_path: Path) -> None:
    path = tiny_weights(tmp_path / "rgb")
    advice = "to adapt its patch embedding, set init.channels to"
    other = r"has a patch embedding of \[32, 192\], but this model needs "
    cases: list[tuple[dict[str, int], ChannelRule, str]] = [
        ({"channels": 4}, "refuse", f"is for RGB, but this model has 4 channels; {advice} repeat, mean or zero_extra"),
        ({"channels": 1}, "refuse", f"is for RGB, but this model has 1 channel; {advice} mean"),
        ({"channels": 4, "patch_size": 4}, "mean", other),
        ({"channels": 4, "dim": 64}, "mean", other),
    ]
    for model, rule, message in cases:
        adaptation = RgbAdaptation(rule, model["channels"])
        with pytest.raises(StreamtrainError, match=message):
            with load_pretrained_backbone(path, shapes_of(**model), adaptation=adaptation):
                pass
    with pytest.raises(StreamtrainError, match=r"already, so init.channels=mean has no effect"):
        with load_pretrained_backbone(path, shapes_of(3), adaptation=RgbAdaptation("mean", 3, is_needed=True)):
            pass
