"""``streamtrain evaluate correspondence``: exact cases, a direct computation, files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import exit_status
from drawn_images import drawn_image
from PIL import Image
from tiny_backbone import CROPS, TINY, tiny_backbone, tiny_weights

import streamtrain
from streamtrain.evaluation import correspondence
from streamtrain.evaluation.maps import patch_features

SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    (folder / "images").mkdir()
    for name, pixels in (("noise", noise), ("shifted", np.roll(noise, (16, -32), (0, 1)))):
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    drawn_image(1, 96, 64).save(folder / "images" / "one.png")
    drawn_image(2, 64, 80).save(folder / "images" / "two.png")
    tiny_weights(folder / "weights")
    (folder / "tiny.yaml").write_text(json.dumps({"model": TINY, "crops": CROPS}))
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def pair(image_a: str, image_b: str, points_a: Any, points_b: Any, **more: Any) -> dict[str, Any]:
    images = {"image_a": f"images/{image_a}.png", "image_b": f"images/{image_b}.png"}
    return {**images, "points_a": np.asarray(points_a).tolist(), "points_b": np.asarray(points_b).tolist(), **more}


def evaluate_pairs(
    capsys: pytest.CaptureFixture[str], pairs: list[dict[str, Any]], *options: str
) -> tuple[list[str], dict[str, Any]]:
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert exit_status(["evaluate", "correspondence", "--pairs", "pairs.jsonl", *options, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_an_image_with_itself_and_shifted_by_whole_patches(capsys: pytest.CaptureFixture[str]) -> None:
    inside = np.random.default_rng(1).uniform(8, SIDE - 8, (40, 2))
    same = pair("noise", "noise", inside, inside)
    lines, result = evaluate_pairs(capsys, [same], "--weights", "weights", "--size", "64")
    assert result["pck_0.1"] == result["pck_0.05"] == 1 and result["test_points"] == 40
    assert lines[0].startswith("PCK@0.1 100.0% ± 0.0, PCK@0.05 100.0% ± 0.0: weights at step 0, 64 px in")
    # between centres of patches that the shift leaves in the image
    points = np.array([[40.5, 8.5], [40.5, 24.5], [52.5, 32.5]])
    moved = points + (-32, 16)
    # 0.05 of the box's side is half a pixel
    tight = pair("noise", "shifted", points, moved, box_b=[0, 0, 10, 10])
    _, result = evaluate_pairs(capsys, [tight, tight], "--pixels", "--size", "64")
    assert result["pck_0.05"] == 1 and result["patch_size"] == 16 and result["test_pairs"] == 2
    wrong = pair("noise", "shifted", points, points)
    _, result = evaluate_pairs(capsys, [same, tight, wrong], "--pixels", "--size", "64")
    assert result["pck_0.1"] == pytest.approx(43 / 46) and result["margin_pck_0.1"] > 0


def found_directly(image_a: str, image_b: str, points: np.ndarray) -> np.ndarray:
    """Return points of ``image_a`` in ``image_b``: the pixel whose interpolated feature is most similar."""
    backbone = tiny_backbone()
    images = [Image.open(f"images/{name}.png") for name in (image_a, image_b)]
    config = backbone.config
    first, second = (patch_features(backbone.model, image, config.mean, config.std).numpy() for image in images)

    def interpolated(features: np.ndarray, x: float, y: float) -> np.ndarray:
        height, width, _ = features.shape
        column, row = np.clip(x / 8 - 0.5, 0, width - 1), np.clip(y / 8 - 0.5, 0, height - 1)
        weights = np.maximum(1 - np.abs(np.arange(height) - row), 0)[:, None] * np.maximum(
            1 - np.abs(np.arange(width) - column), 0
        )
        return np.tensordot(weights, features, 2)

    width, height = images[1].size
    centres = [(x + 0.5, y + 0.5) for y in range(height) for x in range(width)]
    dense = np.stack([interpolated(second, *centre) for centre in centres])
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    return np.array([centres[int((dense @ interpolated(first, *point)).argmax())] for point in points.tolist()])


def test_pck_equals_a_direct_computation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    points = rng.uniform(0, 64, (30, 2))
    expected = found_directly("one", "two", points)
    # annotations at distances of 0 to 12 pixels from the found points
    annotated = np.clip(expected + rng.uniform(-9, 9, (30, 2)), 0, (64, 80))
    distances = np.linalg.norm(annotated - expected, axis=1)
    monkeypatch.setattr(correspondence, "_MAX_KEPT_BYTES", 1)
    for more, side in (({}, 80), ({"box_b": [10, 0, 60, 30.5]}, 50)):
        pairs = [pair("one", "two", points, annotated, **more)] * 2
        _, result = evaluate_pairs(capsys, pairs, "--weights", "weights", "--size", "64")
        for share in (0.1, 0.05):
            assert 0 < result[f"pck_{share}"] < 1
            assert result[f"pck_{share}"] == pytest.approx((distances <= share * side).mean(), abs=1e-9)


def test_comparison_and_default_size(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    pairs = [pair("one", "two", [[5, 5], [60, 30]], [[4, 4], [33, 60]]), pair("two", "two", [[30, 30]], [[30, 30]])]
    network = ("--untrained", "--config", "tiny.yaml")
    lines, result = evaluate_pairs(capsys, pairs, *network, "--compare", "pixels")
    assert result["size"] == 24 * 8 and result["compared_with"] == "pixels" and "margin_over_pck_0.05" in result
    assert len(lines) == 3 and "draws of the pairs" in lines[1] and lines[2].startswith("compared with pixels")
    assert all(not isinstance(value, dict | list) for value in result.values())
    _, same = evaluate_pairs(capsys, pairs, "--weights", "weights", "--compare", "weights", "--size", "32")
    assert same["over_pck_0.1"] == same["margin_over_pck_0.1"] == 0
    found = streamtrain.evaluate("correspondence", pairs="pairs.jsonl", untrained=True, config="tiny.yaml")
    assert found["pck_0.1"] == result["pck_0.1"]


GOOD = {"image_a": "images/one.png", "image_b": "images/two.png", "points_a": [[1, 2]], "points_b": [[3, 4]]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"points_a": [[float("nan"), 2]]}, "[NaN, 2] is not [x, y] in finite pixels"),
        ({"points_a": [[10**400, 2]]}, "is not [x, y] in finite pixels"),
        ({"points_a": [[True, 2]]}, "is not [x, y]"),
        ({"points_a": [["1", 2]]}, "is not [x, y]"),
        ({"points_a": [[1, 2, 3]]}, "is not [x, y]"),
        ({"points_a": []}, "must be a list of 1 to 1000 points"),
        ({"points_a": [[1, 2]] * 1001}, "must be a list of 1 to 1000 points"),
        ({"points_a": [[1, 2]] * 2}, "2 points_a and 1 points_b"),
        ({"points_a": [[97, 2]]}, "(97, 2) of points_a is outside the upright image of 96x64 pixels"),
        ({"points_b": [[-0.5, 2]]}, "(-0.5, 2) of points_b is outside"),
        ({"box_b": [0, 0, 65, 10]}, "(65, 10) of box_b is outside"),
        ({"box_b": [9, 0, 9, 10]}, "box_b must be [left, top, right, bottom]"),
        ({"box_b": 7}, "box_b: 7 is not [left, top, right, bottom]"),
        ({"image_a": "images/none.png"}, "there is no image images/none.png; paths are relative to the file"),
        ({"image_a": "images"}, "there is no image images"),
        ({"image_a": "\ud800\0" + "x" * 5000}, "there is no image"),
        ({"image_a": 3}, "must be paths"),
        ({"image_a": "tiny.yaml"}, "cannot read the image"),
        ({"boxb": [0, 0, 1, 1]}, "unknown key 'boxb'"),
    ],
)
def test_lines_that_cannot_be_used(change: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, **change})}\n")
    assert exit_status(["evaluate", "correspondence", "--pairs", "bad.jsonl", "--pixels", "--size", "32"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("comparing")]
    assert len(error) == 1 and error[0].startswith("error: ") and words in error[0] and len(error[0]) < 1000
    assert "cannot read" in words or "bad.jsonl, line 3" in error[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"[" * 100_000, "line 1 is not a JSON object"),
        (b"[1]", "line 1 is not a JSON object"),
        (b"\xff\xfe", "line 1 is not a JSON object"),
        (b"{}", "line 1 lacks image_a, image_b, points_a, points_b"),
        (b" " * (2**20 + 1), "has more than 1048576 bytes"),
    ],
)
def test_files_that_cannot_be_used(content: bytes, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_bytes(content)
    assert exit_status(["evaluate", "correspondence", "--pairs", "bad.jsonl", "--pixels"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["correspondence", "--pixels"], "needs --pairs"),
        (["correspondence", "--pairs", "nowhere"], "--pairs nowhere does not exist"),
        (["correspondence", "--pairs", "images"], "--pairs images is not a file"),
        (["correspondence", "--pairs", "pairs.jsonl", "--train", "images"], "--train does not belong to"),
        (["correspondence", "--pairs", "pairs.jsonl", "--test-labels", "images"], "--test-labels does not belong"),
        (["knn", "--train", "images", "--pairs", "pairs.jsonl"], "--pairs belongs to correspondence"),
        (["depth", "--labels", "images"], "needs --train"),
    ],
)
def test_options_of_other_tasks(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
