"""``streamtrain evaluate segmentation`` and ``depth`` on a tiny exported network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import exit_status
from mapped_folders import mapped_folder
from tiny_backbone import CROPS, TINY, tiny_weights

import streamtrain
from streamtrain.evaluation import segmentation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = mapped_folder(tmp_path_factory.mktemp("dense"), 20)
    tiny_weights(folder / "weights")
    (folder / "tiny.yaml").write_text(json.dumps({"model": TINY, "crops": CROPS}))
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(segmentation, "MAX_PIXELS", 300)


def evaluate_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict[str, Any]]:
    assert exit_status(["evaluate", *arguments, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


NETWORK = ("--weights", "weights", "--train", "images")


def test_segmentation_and_its_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    task = ("segmentation", "--labels", "masks")
    lines, result = evaluate_here(capsys, *task, *NETWORK, "--compare", "pixels")
    assert lines[0].startswith(f"linear probe mIoU {result['linear_miou']:.1%} ± ") and "4 test images" in lines[0]
    assert lines[1].split() == ["class", "linear", "IoU", "kNN", "IoU", "test", "pixels", "test", "images"]
    assert [line.split()[0] for line in lines[2:4]] == ["0", "3"]
    assert result["classes"] == 2 and result["linear_miou"] == pytest.approx(
        (result["linear_iou_0"] + result["linear_iou_3"]) / 2
    )
    assert result["train_images"] == 16 and result["images_3"] == 4 and result["margin_knn_miou"] > 0
    assert all(not isinstance(value, dict | list) for value in result.values())
    assert lines[-1].startswith("compared with pixels on the same images: linear probe mIoU ")
    _, alone = evaluate_here(capsys, *task, "--pixels", "--size", "32", "--train", "images")
    assert alone["patch_size"] == 16
    _, same = evaluate_here(capsys, *task, *NETWORK, "--compare", "weights")
    assert same["over_knn_miou"] == same["margin_over_knn_miou"] == 0
    assert same["linear_miou"] == result["linear_miou"]


def test_a_test_folder_and_ignored_ids(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--labels", "masks", "--test", "images", "--size", "16", "--ignore", "7")
    lines, result = evaluate_here(capsys, "segmentation", *NETWORK, *arguments)
    assert result["test_images"] == 20 and result["size"] == 16
    assert len(lines) == 5 and "patches of 8" in lines[0]


def test_depth_and_its_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    network = ("--untrained", "--config", "tiny.yaml", "--train", "images")
    lines, result = evaluate_here(capsys, "depth", "--labels", "depth", *network, "--compare", "weights")
    assert lines[0].startswith(
        f"depth RMSE {result['rmse']:.3f} ± {result['margin_rmse']:.3f}, δ1 {result['delta1']:.1%} ±"
    )
    assert len(lines) == 3 and "compared with weights on the same images: depth RMSE " in lines[2]
    assert result["train_images"] == 16 and result["test_images"] == 4 and 0.3 < result["rmse"] < 3
    found = streamtrain.evaluate("depth", train="images", labels="depth", untrained=True, config="tiny.yaml")
    assert found["rmse"] == result["rmse"]


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_a_set_gives_the_numbers_of_the_folders_it_was_packed_from(
    task: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = "masks" if task == "segmentation" else "depth"
    if not (folder / "set").exists():
        assert exit_status(["pack", "--src", "images", "--seg", "masks", "--depth", "depth", "--out", "set"]) == 0
        assert "maps: 20 images with a depth map" in capsys.readouterr().out
    network = ("--weights", "weights", "--compare", "pixels")
    _, expected = evaluate_here(capsys, task, "--train", "images", "--labels", labels, *network)
    lines, result = evaluate_here(capsys, task, "--train", "set", *network)
    different = {key for key in expected if result[key] != expected[key]}
    assert different == {"train", "test", "labels"} and "4 test images" in lines[0]
    # a folder to learn from, and a set to predict
    both = ("--weights", "weights", "--train", "images", "--labels", labels)
    _, mixed = evaluate_here(capsys, task, *both, "--test", "set")
    _, folders = evaluate_here(capsys, task, *both, "--test", "images")
    assert {key for key in mixed if mixed[key] != folders[key]} == {"test"}


def test_a_set_without_maps_names_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["pack", "--src", "images", "--depth", "depth", "--out", "half"]) == 0
    capsys.readouterr()
    assert exit_status(["evaluate", "segmentation", "--weights", "weights", "--train", "half"]) == 2
    assert "half has no masks; pack it with --seg DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("segmentation", [], "with --labels"),
        ("segmentation", ["--labels", "depth"], "has a label file"),
        ("segmentation", ["--labels", "masks", "--ignore", "0"], "have the same class"),
        ("segmentation", ["--labels", "masks", "--size", "30"], "not a multiple"),
        ("segmentation", ["--labels", "masks", "--test-labels", "masks"], "belongs to --test"),
        ("depth", ["--labels", "masks"], "16 bits"),
        ("depth", ["--labels", "depth", "--ignore", "0"], "--ignore names class ids"),
        ("knn", ["--labels", "masks"], "--labels belongs to segmentation"),
        ("linear", ["--ignore", "1"], "--ignore belongs to segmentation"),
    ],
)
def test_errors_name_the_option(
    task: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["evaluate", task, *NETWORK, *arguments]) == 2
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert last.startswith("error: ") and words in last and printed.out == ""
