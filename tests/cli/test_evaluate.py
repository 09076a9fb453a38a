"""``streamtrain evaluate`` on a tiny exported network."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from commands import exit_status, run_command
from drawn_images import draw_folder
from PIL import Image
from tiny_backbone import CROPS, TINY, class_folder, tiny_weights

from shards.packing.pack import PackOptions, pack
from streamtrain.cli.evaluate import MAX_IMAGES_FOR_SPLITS


def evaluate(cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_command("evaluate", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    class_folder(folder / "images", each=20)
    tiny_weights(folder / "weights")
    (folder / "tiny.yaml").write_text(json.dumps({"model": TINY, "crops": CROPS}))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(commands.ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "streamtrain" / "features"


def evaluate_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict[str, Any], str]:
    """Run in this process; return the printed lines, the JSON object and stderr."""
    assert exit_status(["evaluate", *arguments, "--json"]) == 0
    printed = capsys.readouterr()
    *lines, last = printed.out.splitlines()
    return lines, json.loads(last), printed.err


def test_knn_of_an_exported_folder_on_a_class_folder(folder: Path) -> None:
    done = evaluate(folder, "knn", "--weights", "weights", "--train", "images", "--json")
    assert done.returncode == 0, done.stderr
    # without a terminal the progress bar is a line now and then
    assert "images: 40/40 images" in done.stderr and done.stderr.count("\n") < 20
    assert "\r" not in done.stderr
    line, *_, last = done.stdout.splitlines()
    result = json.loads(last)
    assert line.startswith("kNN accuracy k=10 ") and "weights" in line
    assert result["train_images"] == 32 and result["test_images"] == 8 and result["classes"] == 2
    assert 0 <= result["knn_20"] <= 1 and result["feature_dim"] == 32 and result["size"] == 32
    assert all(not isinstance(value, dict | list) for value in result.values())
    again = evaluate(folder, "knn", "--weights", "weights", "--train", "images", "--json")
    both = [{**json.loads(each.stdout.splitlines()[-1]), "feature_seconds": 0} for each in (done, again)]
    assert both[0] == both[1]
    assert "features of images: from the cache" in again.stderr and "reading" not in again.stderr


def test_linear_of_an_untrained_network(folder: Path) -> None:
    done = evaluate(folder, "linear", "--untrained", "--config", "tiny.yaml", "--train", "images", "--test", "images")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("linear probe accuracy ") and "untrained" in done.stdout
    assert done.stdout.count("\n") == 2


def test_another_task_uses_the_features_of_the_first(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    network = ["--untrained", "--config", "tiny.yaml", "--train", "images"]
    first = evaluate_here(capsys, "knn", *network)
    assert "from the cache" not in first[2] and len(list(cache.iterdir())) == 1
    second = evaluate_here(capsys, "linear", *network)
    assert "from the cache" in second[2] and "reading" not in second[2]
    computed = evaluate_here(capsys, "linear", *network, "--no-cache")
    assert "from the cache" not in computed[2]
    assert second[1]["linear"] == computed[1]["linear"] and len(list(cache.iterdir())) == 1
    for other in (["--size", "16"], ["--resize", "40"]):
        assert "from the cache" not in evaluate_here(capsys, "knn", *network, *other)[2]
    # the images of one class folder were changed
    path = folder / "images" / "down" / "000.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert "from the cache" not in evaluate_here(capsys, "knn", *network)[2]
    for file in cache.iterdir():
        file.write_bytes(b"damage")
    assert "from the cache" not in evaluate_here(capsys, "knn", *network)[2]


def test_accuracies_have_their_uncertainty(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    lines, result, _ = evaluate_here(capsys, "knn", "--pixels", "--train", "images")
    assert len(lines) == 3 and f"k=20 {result['knn_20']:.1%} ± {100 * result['margin_knn_20']:.1f}: " in lines[0]
    assert lines[1].startswith("over 5 splits, which test every image once: k=10 ") and result["splits"] == 5
    assert result["margin_mean_knn_20"] < result["margin_knn_20"] < 0.5 and 0 <= result["spread_knn_20"] < 0.5
    least = max(result["real_difference_knn_10"], result["real_difference_knn_20"])
    assert "95% interval" in lines[2] and f"if they are {100 * least:.1f} points apart" in lines[2]
    # a test set is one split
    lines, result, _ = evaluate_here(capsys, "knn", "--pixels", "--train", "images", "--test", "images")
    assert len(lines) == 2 and "splits" not in result and "mean_knn_10" not in result
    # too many images for five splits
    monkeypatch.setitem(MAX_IMAGES_FOR_SPLITS, "knn", 39)
    lines, result, _ = evaluate_here(capsys, "knn", "--pixels", "--train", "images")
    assert (
        lines[1].startswith("one split was tested; with at most 39 images")
        and result["splits"] == 1
        and "mean_knn_10" not in result
    )


@pytest.mark.parametrize("other", ["untrained", "pixels", "weights"])
def test_a_comparison_is_made_image_by_image(
    other: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    network = ["--untrained", "--config", "tiny.yaml", "--train", "images"]
    lines, result, _ = evaluate_here(capsys, "knn", *network, "--compare", other)
    assert lines[-1].startswith(f"compared with {other} on the same images: k=10 ")
    options = {"pixels": ["--pixels"], "weights": ["--weights", "weights"], "untrained": network[:3]}[other]
    _, alone, _ = evaluate_here(capsys, "knn", *options, "--train", "images")
    assert result["over_knn_10"] == pytest.approx(result["mean_knn_10"] - alone["mean_knn_10"])
    assert 0 < result["margin_over_knn_10"] < 0.5 and result["compared_with"] == other
    if other == "untrained":
        trained = ["--weights", "weights", "--config", "tiny.yaml", "--train", "images", "--compare", "untrained"]
        assert evaluate_here(capsys, "knn", *trained)[1]["features"] == "weights"
        assert result["over_knn_10"] == 0 and "+0.0 points" in lines[-1] and "may be chance" in lines[-1]


def test_pixels_on_a_shard_set_equal_those_on_its_folder(folder: Path) -> None:
    pack(folder / "images", folder / "set", PackOptions())
    results = []
    for name in ("images", "set"):
        done = evaluate(folder, "knn", "--pixels", "--train", name, "--test", "images", "--json")
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert results[0]["knn_20"] == results[1]["knn_20"] and results[0]["features"] == "pixels"


def test_an_error_is_one_line(folder: Path) -> None:
    done = evaluate(folder, "knn", "--weights", "nowhere", "--train", "images")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train", "images"], "select the network"),
        (["--weights", "weights", "--train", "nowhere"], "not a folder"),
        (["--weights", "images", "--train", "images"], "neither"),
        (["--run", "weights", "--train", "images"], "not a run directory"),
        (["--weights", "weights", "--train", "images", "--size", "30"], "not a multiple"),
        (["--weights", "weights", "--pixels", "--train", "images"], "--pixels"),
        (["--weights", "weights", "--step", "5", "--train", "images"], "--step"),
        (["--untrained", "--train", "images"], "--untrained needs"),
        (["--pixels", "--train", "images", "--compare", "untrained"], "--compare untrained needs"),
        (["--pixels", "--train", "images", "--compare", "nowhere"], "--compare nowhere is neither"),
    ],
)
def test_errors_name_the_option(
    folder: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert exit_status(["evaluate", "knn", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and words in printed.err
    assert printed.out == ""


def test_images_of_a_single_class_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_folder(tmp_path / "images", 20, ("cat",))
    monkeypatch.chdir(tmp_path)
    assert exit_status(["evaluate", "knn", "--pixels", "--train", "images"]) == 2
    line = "error: all images of images have the same label; give images of several classes\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(("num_damaged", "status"), [(2, 0), (8, 2)])
def test_unusable_images_are_named_and_left_out_up_to_a_share(folder: Path, num_damaged: int, status: int) -> None:
    name = f"damaged-{num_damaged}"
    images = sorted(class_folder(folder / name, each=20).rglob("*.png"))
    for image in images[:num_damaged]:
        image.write_bytes(b"damage")
    done = evaluate(folder, "knn", "--pixels", "--train", name, "--test", "images", "--json")
    assert done.returncode == status and "Traceback" not in done.stderr
    message = f"{num_damaged} of 40 images of {name} could not be used: cannot read the image {name}/across/000.png"
    assert message in done.stderr and ("more than 10%" in done.stderr) == bool(status)
    if not status:
        result = json.loads(done.stdout.splitlines()[-1])
        assert (result["train_images"], result["test_images"]) == (38, 40)


def test_a_set_that_tests_itself_is_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = folder / "weights" / ".." / "images"
    assert exit_status(["evaluate", "knn", "--pixels", "--train", folder / "images", "--test", same]) == 0
    assert "leave out --test to hold out a fifth" in capsys.readouterr().err
