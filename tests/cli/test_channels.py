"""Commands on plain folders of images of 4 channels of 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import imagecodecs
import numpy as np
import pytest

pytest.importorskip("tifffile")
from channel_images import ramp, tiff
from commands import exit_status
from interop.test_channels import backbone_of
from PIL import Image
from tiny_backbone import tiny_weights

import streamtrain
from shards.format.pixels import PixelFormat
from shards.packing.pack import PackOptions, pack
from streamtrain.interop.export import export_backbone

FOUR = PixelFormat(4, "uint16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 4 channels, and 24 images of two classes in every kind of file, as a folder and as a set."""
    folder = tmp_path_factory.mktemp("channels")
    export_backbone(backbone_of(4, "uint16", value_range=[100, 10000]), "safetensors", folder / "weights")
    for number in range(24):
        place = folder / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        values = ramp(FOUR, number * 100, 40, 36)
        if number % 3 == 0:
            np.save(place / f"{number:02}.npy", values.transpose(2, 0, 1))
        elif number % 3 == 1:
            (place / f"{number:02}.png").write_bytes(imagecodecs.png_encode(values))
        else:
            tiff(values, place / f"{number:02}.tif", planarconfig="separate")
    pack(folder / "images", folder / "set", PackOptions(pixels=FOUR))
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = exit_status(["evaluate", "knn", "--no-cache", *map(str, words)])
    return status, *capsys.readouterr()


def test_evaluation_reads_a_folder_as_its_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = ("--weights", folder / "weights", "--json")
    printed = [evaluate(capsys, *network, "--train", folder / name) for name in ("images", "set")]
    results = [json.loads(out.splitlines()[-1]) for status, out, _ in printed if status == 0]
    assert len(results) == 2 and results[0]["train_images"] == 20
    same = results[0].keys() - {"train", "test", "feature_seconds"}
    assert {key: results[0][key] for key in same} == {key: results[1][key] for key in same}
    backbone = streamtrain.load_backbone(folder / "weights")
    ours, names = streamtrain.embed(backbone, folder / "images")
    theirs, keys = streamtrain.embed(backbone, folder / "set")
    assert np.array_equal(ours, theirs) and names[:2] == ["a/00.npy", "a/02.tif"] and len(keys) == 24


def test_images_that_do_not_match_are_counted_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(24):
        (tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "images" / "ab"[number % 2] / f"{number:02}.npy", ramp(FOUR, number * 100))
    tiff(ramp(PixelFormat(5, "uint16")), tmp_path / "images" / "a" / "five.tif")
    status, _, errors = evaluate(capsys, "--weights", folder / "weights", "--train", tmp_path / "images")
    assert status == 0 and "1 of 25 images" in errors
    assert "a/five.tif: it has 5 channels of uint16, not 4 channels of uint16" in errors
    for number in range(6):
        (tmp_path / "rgb" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "rgb" / "ab"[number % 2] / f"{number}.png")
    status, _, errors = evaluate(capsys, "--weights", folder / "weights", "--train", tmp_path / "rgb")
    last = errors.splitlines()[-1]
    assert status == 2 and last.startswith("error: 6 of 6 images")
    assert "it has 3 channels of uint8, not 4 channels of uint16" in last
    # networks of other images cannot be compared
    rgb = tiny_weights(tmp_path / "weights")
    words = ("--weights", folder / "weights", "--train", folder / "images", "--compare", rgb)
    status, _, errors = evaluate(capsys, *words)
    assert status == 2 and "needs images of 3 channels of uint8, the network has 4 channels of uint16" in errors


@pytest.mark.parametrize("name", ["a/00.npy", "a/02.tif", "b/01.png"])
def test_maps_are_drawn_of_every_kind_of_file(folder: Path, tmp_path: Path, name: str) -> None:
    words = ["--weights", str(folder / "weights"), "--image", str(folder / "images" / name)]
    assert exit_status(["visualize", "pca", *words, "--out", str(tmp_path / "page.png")]) == 0
    assert Image.open(tmp_path / "page.png").mode == "RGB"
