"""ONNX exports compute what PyTorch computes, for any batch and size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import exit_status
from data.test_channels import PLAIN
from drawn_images import drawn_image
from tiny_backbone import CROPS, TINY, tiny_backbone, tiny_weights

from streamtrain.config.load import build
from streamtrain.interop.folder import BackboneConfig
from streamtrain.interop.load import Backbone, load_untrained, load_weights
from streamtrain.interop.onnx_folder import OPSET, export_onnx

# patches in a column and in a row
GRIDS = ((1, 1), (4, 4), (2, 7), (9, 5))


def largest_error(folder: Path, backbone: Backbone) -> float:
    """Return the largest difference between onnxruntime and PyTorch over all features, sizes and two batches."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    patch, channels = backbone.model.patch_size, backbone.config.model.channels
    generator = torch.Generator().manual_seed(0)
    errors = []
    for rows, columns in GRIDS:
        for batch in (1, 3):
            images = torch.randn(batch, channels, rows * patch, columns * patch, generator=generator)
            cls, patches = session.run(["cls", "patches"], {"pixel_values": images.numpy()})
            with torch.no_grad():
                expected = backbone.forward_features(images)
            assert patches.shape == (batch, rows * columns, backbone.config.model.dim)
            for found, wanted in ((cls, expected.cls), (patches, expected.patches)):
                assert wanted.std() > 0.1
                errors.append(np.abs(found - wanted.numpy()).max())
    return float(max(errors))


def check_readme(folder: Path, backbone: Backbone, source: Any) -> None:
    """Run the code of the folder's README, and compare its features with ours: one image, a path or an array."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = code.replace('folder = "."', f"folder = {str(folder)!r}").replace('"photo.jpg"', repr(str(source)))
    names: dict[str, Any] = {"given": source}
    exec(code.replace("image = ...", "image = given"), names)
    with torch.no_grad():
        features = backbone.forward_features(backbone.preprocess(source))
    np.testing.assert_allclose(names["cls"], features.cls, rtol=0, atol=0.05)
    np.testing.assert_allclose(names["patches"], features.patches, rtol=0, atol=0.1)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    tiny_weights(Path("weights"))
    assert exit_status(["export", "--weights", "weights", "--to", "onnx", "--out", "out"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "wrote out/model.onnx (backbone of 0.0 M parameters, onnx)\n" and shown.err == ""
    backbone = load_weights(Path("weights"))
    assert largest_error(Path("out"), backbone) < 1e-4
    graph = onnx.load("out/model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", OPSET)]
    assert {entry.key: entry.value for entry in graph.metadata_props}[
        "streamtrain"
    ] == backbone.config.model_dump_json()
    assert BackboneConfig.model_validate_json(Path("out/config.json").read_text()) == backbone.config
    processor = json.loads(Path("out/preprocessor_config.json").read_text())
    assert processor["image_mean"] == list(backbone.config.mean)
    drawn_image(0, 300, 200).save("photo.png")
    check_readme(Path("out"), backbone, "photo.png")
    # of another format, over this one
    assert exit_status(["export", "--weights", "weights", "--to", "safetensors", "--out", "out"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_the_readme_for_other_channels(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    crops = {**CROPS, **PLAIN, "mean": [0.2, 0.1], "std": [0.3, 0.2]}
    backbone = load_untrained(build({"model": TINY, "data": {"channels": 2, "dtype": "uint16"}, "crops": crops}))
    export_onnx(backbone.model, backbone.config, tmp_path)
    check_readme(tmp_path, backbone, np.random.default_rng(0).integers(0, 2000, (40, 32, 2), np.uint16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        {"mlp": "swiglu", "mlp_hidden": 48, "num_registers": 0, "key_bias": True, "patch_size": 4},
        {"qkv_bias": False, "untied_norms": "cls"},
        {"dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16},
    ],
    ids=["swiglu", "untied", "vits16"],
)  # fmt: skip
def test_other_shapes(shape: dict[str, Any], tmp_path: Path) -> None:
    backbone = tiny_backbone(**shape)
    export_onnx(backbone.model, backbone.config, tmp_path)
    assert largest_error(tmp_path, backbone) < 1e-4
