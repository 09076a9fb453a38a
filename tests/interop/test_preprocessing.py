"""Every export carries the preprocessing: transformers, timm and streamtrain give the network the same pixels."""

from __future__ import annotations

import json
import re
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import exit_status
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_backbone import tiny_backbone, tiny_config

from streamtrain.errors import StreamtrainError
from streamtrain.interop.export import export_backbone
from streamtrain.interop.folder import BackboneConfig
from streamtrain.interop.hf import export_hf, preprocessing_from_hf
from streamtrain.interop.load import Backbone, load_backbone, load_weights
from streamtrain.interop.timm_folder import crop_share

# width and height of photographs; the last ones are panoramas, and one is smaller than the input
SIZES = ((640, 480), (480, 640), (333, 500), (401, 300), (97, 130), (224, 224), (1000, 231), (231, 1403))
# by their names in BackboneConfig
PREPROCESSING = ("image_size", "resize", "interpolation", "mean", "std", "background")


def photograph(number: int, width: int, height: int) -> Image.Image:
    """Draw discs of many sizes on a gradient, with fine texture: structure at all scales, different at each place."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[0:height, 0:width] / np.float32(min(width, height))
    pixels = np.stack([rows, columns, rows * columns], -1) * rng.uniform(-60, 60, 3) + rng.uniform(60, 190, 3)
    for _ in range(40):
        y, x, radius = rng.uniform(0, rows.max()), rng.uniform(0, columns.max()), rng.uniform(0.02, 0.25)
        pixels[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = rng.uniform(0, 255, 3)
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [photograph(number, *size) for number, size in enumerate(SIZES)]


def preset_shaped(size: int = 224, resize: int | None = None, **fields: Any) -> Backbone:
    """Return a network with patches of 16 pixels and heads of width 64, for inputs of ``size`` pixels."""
    backbone = tiny_backbone(patch_size=16, dim=128, num_heads=2)
    values = {**backbone.config.model_dump(), "image_size": size, "resize": resize or size, **fields}
    return Backbone(backbone.model, BackboneConfig.model_validate(values))


def cosines(folder: Path, backbone: Backbone, images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine of transformers' pooled features to ours for each image, as they are and less our mean.

    The features of an untrained network are nearly equal for all images, so only their deviation from the mean shows
    differences in the pixels.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    ours = torch.cat([backbone.forward_features(backbone.preprocess(image)).cls for image in images])
    with torch.no_grad():
        theirs = torch.cat([model(**processor(image, return_tensors="pt")).pooler_output for image in images])
    mean = ours.mean(0)
    return torch.cosine_similarity(theirs, ours), torch.cosine_similarity(theirs - mean, ours - mean)


@pytest.mark.parametrize(("size", "resize"), [(224, 224), (224, 256), (48, 48)])
def test_transformers_gives_our_features_of_photographs(
    size: int, resize: int, photographs: list[Image.Image], tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = preset_shaped(size, resize)
    export_hf(backbone.model, backbone.config, tmp_path)
    plain, centred = cosines(tmp_path, load_backbone(tmp_path), photographs)
    # squashed to a square, as in earlier exports: the photographs tell the two apart
    path = tmp_path / "preprocessor_config.json"
    squash = {"size": {"height": size, "width": size}, "do_center_crop": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | squash))
    _, squashed = cosines(tmp_path, backbone, photographs)
    print(f"{size} of {resize}: plain {plain.tolist()}, centred {centred.tolist()}, squashed {squashed.tolist()}")
    assert plain.min() > 0.999 and centred.min() > 0.999
    assert squashed.min() < 0.8


def test_every_format_returns_the_preprocessing(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for number, fields in enumerate(
        (
            {"size": 224, "resize": 256, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "background": (0, 10, 20)},
            {"size": 48, "background": None},
        )
    ):
        backbone = preset_shaped(**fields)
        expected = backbone.config.model_dump(include=set(PREPROCESSING))
        image = photograph(0, 300, 200)
        for kind in ("hf", "timm", "safetensors"):
            export_backbone(backbone, kind, tmp_path / f"{kind}{number}")
            again = load_backbone(tmp_path / f"{kind}{number}")
            assert again.config.model_dump(include=set(PREPROCESSING)) == expected, kind
            assert torch.equal(again.preprocess(image), backbone.preprocess(image))


def test_earlier_exports_load_with_a_central_crop(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = preset_shaped(48)
    image = photograph(0, 300, 200)
    for kind in ("hf", "timm", "safetensors"):
        export_backbone(backbone, kind, tmp_path / kind)
        path = tmp_path / kind / ("preprocessor_config.json" if kind == "hf" else "config.json")
        document = json.loads(path.read_text())
        if kind == "hf":
            document |= {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 48, "width": 48}}
        for key in ("do_center_crop", "crop_size", "do_convert_rgb", "resize", "interpolation"):
            document.pop(key, None)
        if kind != "safetensors":
            del document["background"]
        path.write_text(json.dumps(document))
        assert torch.equal(load_weights(tmp_path / kind).preprocess(image), backbone.preprocess(image))
    # the description in the header of the weights file
    tensors, header = load_file(tmp_path / "safetensors" / "model.safetensors"), document
    save_file(tensors, tmp_path / "alone.safetensors", {"streamtrain": json.dumps(header)})
    assert load_weights(tmp_path / "alone.safetensors").config == backbone.config


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, {}),
        ({"size": None, "crop_size": None, "do_center_crop": None}, {}),
        # Meta's DINOv3 folders
        ({"size": {"height": 224, "width": 224}, "crop_size": None, "do_center_crop": None, "resample": 2,
          "rescale_factor": 0.00392156862745098}, {"image_size": 224, "resize": 224}),
        # Meta's DINOv2 folders
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
          "image_mean": [0.1, 0.2, 0.3]}, {"image_size": 224, "resize": 256, "mean": [0.1, 0.2, 0.3]}),
        ({"size": 256, "do_center_crop": True, "crop_size": 224}, {"image_size": 224, "resize": 256}),
        ({"size": 256, "do_center_crop": False, "crop_size": 224}, {"image_size": 256, "resize": 256}),
        ({"size": 256, "do_resize": False, "do_center_crop": True, "crop_size": 224},
         {"image_size": 224, "resize": 224}),
        ({"do_normalize": False, "image_mean": [0.5] * 3}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
    ],
)  # fmt: skip
def test_what_a_processor_states_is_used(stated: dict[str, Any], expected: dict[str, Any]) -> None:
    assert preprocessing_from_hf(stated, "folder") == expected


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"do_rescale": False}, "rescale_factor 1 is not supported, only 1/255"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.00784"),
        ({"do_center_crop": True, "crop_size": {"height": 224, "width": 192}}, "crop_size that is not square"),
        (
            {"do_center_crop": True, "crop_size": 64, "size": {"shortest_edge": 56}},
            "resize 56 is smaller than the crop",
        ),
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused(
    stated: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = preset_shaped(48)
    export_hf(backbone.model, backbone.config, tmp_path / "hf")
    # transformers must not add lines of its own to an export
    assert capsys.readouterr().err == ""
    path = tmp_path / "hf" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    status = exit_status(["export", "--weights", tmp_path / "hf", "--to", "safetensors", "--out", tmp_path / "out"])
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1


def test_the_code_of_the_model_card_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = preset_shaped(64)
    export_hf(backbone.model, backbone.config, tmp_path / "exported")
    # stored lying, as cameras do
    image = photograph(0, 300, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    card = (tmp_path / "exported" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    code = code.replace('folder = "."', f"folder = {str(tmp_path / 'exported')!r}")
    exec(code.replace('"photo.jpg"', repr(str(tmp_path / "photo.png"))), names)
    assert names["inputs"]["pixel_values"].shape == (1, 3, 64, 64)
    features = backbone.forward_features(backbone.preprocess(tmp_path / "photo.png"))
    torch.testing.assert_close(names["output"].pooler_output.detach(), features.cls, rtol=0, atol=0.02)
    assert "the shorter side to 64 pixels" in card and "RGB (255, 255, 255)" in card


def pixels_of_timm(settings: dict[str, Any], image: Image.Image) -> torch.Tensor:
    """Return the input [3, S, S] that timm computes: torchvision's Resize and CenterCrop with timm's rounding."""
    assert settings["crop_mode"] == "center" and settings["interpolation"] == "bicubic"
    _, size, _ = settings["input_size"]
    side = floor(size / settings["crop_pct"])
    short, long = sorted(image.size)
    scaled = [side if edge == short else int(side * long / short) for edge in image.size]
    image = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    left, top = (round((edge - size) / 2) for edge in image.size)
    crop = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return torch.from_numpy((crop - settings["mean"]) / settings["std"]).permute(2, 0, 1).float()


@pytest.mark.parametrize(("size", "resize"), [(224, 224), (224, 256), (48, 48)])
def test_the_settings_of_timm_give_our_pixels(
    size: int, resize: int, photographs: list[Image.Image], tmp_path: Path
) -> None:
    backbone = preset_shaped(size, resize)
    export_backbone(backbone, "timm", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    # timm passes these to a dataclass, which rejects other names
    assert set(settings) <= {
        "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes",
        "pool_size", "first_conv", "classifier",
    }  # fmt: skip
    ours = torch.cat([backbone.preprocess(image) for image in photographs])
    theirs = torch.stack([pixels_of_timm(settings, image) for image in photographs])
    features = [backbone.forward_features(pixels).cls for pixels in (ours, theirs)]
    cosine = torch.cosine_similarity(*features)
    print(f"timm, {size} of {resize}: {cosine.tolist()}")
    # timm rounds half a pixel to even, not down, so the crop of some photographs is one pixel off
    assert cosine.min() > 0.999
    is_off = [(int(resize * max(image.size) / min(image.size)) - size) % 4 == 3 for image in photographs]
    assert any(is_off) and not all(is_off)
    for off, (their, our) in zip(is_off, zip(theirs, ours, strict=True), strict=True):
        # one of the 256 levels is 0.02
        assert (their - our).abs().mean() < 0.02 or off


def test_the_share_of_timm_survives_truncation() -> None:
    for size in (32, 48, 96, 224, 256, 512, 768):
        for resize in range(size, 2 * size):
            share = crop_share(size, resize)
            assert floor(size / share) == resize and 0 < share <= 1


@pytest.mark.parametrize("share", [0, -1, 1.5, "all", [1], float("nan")])
def test_a_senseless_share_is_one_line(share: Any, tmp_path: Path) -> None:
    backbone = preset_shaped(48)
    export_backbone(backbone, "timm", tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document["pretrained_cfg"]["crop_pct"] = share
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(StreamtrainError, match=r"crop_pct|NaN"):
        load_backbone(tmp_path)


def test_another_size_keeps_the_margin() -> None:
    assert [preset_shaped(224, 256).config.resize_for(size) for size in (112, 224, 448)] == [128, 256, 512]
    assert [preset_shaped(224).config.resize_for(size) for size in (16, 224, 518)] == [16, 224, 518]
    config = tiny_config()
    assert tiny_backbone().config.resize == config.square_side
