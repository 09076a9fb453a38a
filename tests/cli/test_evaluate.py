"""``streamtrain evaluate`` on a tiny exported network."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from commands import exit_status, run_command
from tiny_backbone import CROPS, TINY, class_folder, tiny_weights

from shards.packing.pack import PackOptions, pack


def evaluate(cwd: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_command("evaluate", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    class_folder(folder / "images", each=20)
    tiny_weights(folder / "weights")
    (folder / "tiny.yaml").write_text(json.dumps({"model": TINY, "crops": CROPS}))
    return folder


def test_knn_of_an_exported_folder_on_a_class_folder(folder: Path) -> None:
    done = evaluate(folder, "knn", "--weights", "weights", "--train", "images", "--json")
    assert done.returncode == 0, done.stderr
    # without a terminal the progress bar is a line now and then
    assert "images: 32/32 images" in done.stderr.splitlines()[-3] and done.stderr.count("\n") < 20
    assert "\r" not in done.stderr
    line, last = done.stdout.splitlines()
    result = json.loads(last)
    assert line.startswith("kNN accuracy k=10 ") and "weights" in line
    assert result["train_images"] == 32 and result["test_images"] == 8 and result["classes"] == 2
    assert 0 <= result["knn_20"] <= 1 and result["feature_dim"] == 32 and result["size"] == 32
    assert all(not isinstance(value, dict | list) for value in result.values())
    assert (
        evaluate(folder, "knn", "--weights", "weights", "--train", "images", "--json")
        .stdout.splitlines()[-1]
        .split("feature_seconds")[0]
        == last.split("feature_seconds")[0]
    )


def test_linear_of_an_untrained_network(folder: Path) -> None:
    done = evaluate(folder, "linear", "--untrained", "--config", "tiny.yaml", "--train", "images", "--test", "images")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("linear probe accuracy ") and "untrained" in done.stdout
    assert done.stdout.count("\n") == 1


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
