"""``streamtrain visualize`` with a tiny exported network."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import exit_status, run_command
from PIL import Image
from tiny_backbone import class_folder, tiny_weights

from streamtrain.reporting.metrics import MetricsLog


def visualize(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command("visualize", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visualize")
    class_folder(folder / "images", each=1)
    Image.effect_noise((90, 60), 80).convert("RGB").save(folder / "wide.png")
    tiny_weights(folder / "weights")
    return folder


def red_cross(page: np.ndarray) -> np.ndarray:
    return np.argwhere((page == (230, 30, 40)).all(-1))


def test_similarity_page(folder: Path) -> None:
    images = ["wide.png", "images/down/000.png"]
    done = visualize(
        folder, "similarity", "--weights", "weights", "--image", *images, "--patch", "0,0", "3,5", "--out", "s.png"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote s.png")
    page = np.asarray(Image.open(folder / "s.png"))
    assert page.shape[0] > 900 and page.shape[1] > 1800
    assert len(red_cross(page)) > 4 * 100  # on image and map, for each patch


def test_pca_page(folder: Path) -> None:
    done = visualize(
        folder, "pca", "--weights", "weights/model.safetensors", "--image", "wide.png", "--size", "64", "--smooth",
        "--out", "new/p.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = np.asarray(Image.open(folder / "new" / "p.png"))
    assert page.shape[0] > 480 and page.shape[1] > 1200 and len(red_cross(page)) == 0
    assert len(np.unique(page.reshape(-1, 3), axis=0)) > 1000


def test_matches_page(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    images = ["--size", "64", "--image", "wide.png", "wide.png"]
    command = ["visualize", "matches", "--weights", "weights", *images, "--count", "7", "--out"]
    assert exit_status([*command, "m.png"]) == 0
    page = np.asarray(Image.open("m.png")).astype(int)
    assert page.shape[0] > 480 and page.shape[1] > 2 * 600
    # the noise is grey; matches of an image with itself are level lines over the gap between the two
    gap = page[98:498, 624:638]
    is_colour = np.ptp(gap, axis=-1) > 60
    assert 1 <= is_colour.all(1).sum() <= 3 * 7 and not is_colour[~is_colour.all(1)].any()
    assert exit_status([*command, "m.html", "--foreground"]) == 0
    (found,) = re.findall(r'"matches": (\[.*\])\}', Path("m.html").read_text())
    matches = json.loads(found)
    assert 1 <= len(matches) <= 7 and all(first == second for (first, second), _ in matches)
    capsys.readouterr()
    assert exit_status([*command[:-4], "--image", "wide.png", "--out", "x.png"]) == 2
    assert "expected 2 arguments" in capsys.readouterr().err


def test_pca_of_a_large_input_is_drawn_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    pages = []
    for options in ([], ["--smooth"]):
        command = ["visualize", "pca", "--weights", "weights", "--image", "images/down/000.png", "--size", "512"]
        assert exit_status([*command, *options, "--out", "large.png"]) == 0
        pages.append(np.asarray(Image.open("large.png")).astype(int))
    side = min(Image.open("images/down/000.png").size)
    assert min(pages[0].shape[:2]) > 512 and pages[0].shape[1] > 2 * 512 and side < 50
    # 64 patches: every eighth column may differ from its left neighbour, if nothing is interpolated
    left = 24 + pages[0].shape[1] // 2 - 24 + 14
    changes = [np.abs(np.diff(page[150:450, left : left + 400], axis=1)).sum(-1).max(0) > 0 for page in pages]
    assert changes[0].mean() < 0.2 and changes[1].mean() > 0.9


def test_several_patches_of_one_image_are_drawn_in_a_grid(folder: Path) -> None:
    patches = ["0,0", "3,5", "7,1"]
    done = visualize(
        folder, "similarity", "--weights", "weights", "--image", "wide.png", "--size", "64", "--patch", *patches,
        "--out", "g.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = np.asarray(Image.open(folder / "g.png"))
    assert page.shape[0] > 2 * 400 and 2 * 600 < page.shape[1] < 3 * 600
    assert len(red_cross(page)) > 6 * 100  # each on the image and on its map


def test_crops_page_of_an_image(folder: Path) -> None:
    done = visualize(folder, "crops", "--config", "quickstart.yaml", "--image", "wide.png", "--draws", "2",
                     "--out", "c.png", "crops.local_count=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(folder / "c.png")).shape[0] > 250
    done = visualize(folder, "crops", "--image", "wide.png", "--out", "c.png")
    assert done.returncode == 2 and done.stderr == "error: give the recipe: one of --run and --config\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "nowhere.png"], "cannot read the image"),
        (["--image", "weights/config.json"], "cannot read the image"),
        (["--image", "wide.png", "--patch", "99,0"], "outside the image's grid of 24 rows and 36 columns"),
        (["--image", "wide.png", "--size", "3"], "less than one patch"),
    ],
)
def test_errors_are_one_line(
    folder: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert exit_status(["visualize", "similarity", "--weights", "weights", *arguments, "--out", "x.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (folder / "x.png").exists()


def test_attention_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    images = ["--image", "wide.png", "images/down/000.png"]
    assert exit_status(["visualize", "attention", "--weights", "weights", *images, "--out", "a.png"]) == 0
    page = np.asarray(Image.open("a.png"))
    assert page.shape[0] > 2 * 200 and page.shape[1] > 4 * 300  # image, mean and two heads of a wide image


def test_curves_page(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, start in (("a", 5), ("b", 9)):
        (folder / name).mkdir()
        log = MetricsLog(folder / name / "metrics.jsonl", 0)
        for step in range(1, 30):
            log.write(step, step, {"loss/total": start / step, "optim/gradient_norm": float("nan")})
        log.close()
    monkeypatch.chdir(folder)
    for runs, out, status in ((["a", "b"], "c.png", 0), (["a", "weights"], "none.png", 2)):
        assert exit_status(["visualize", "curves", "--run", *runs, "--out", out]) == status
    assert "error: weights is not a run directory" in capsys.readouterr().err
    # a format that Pillow writes, but not with these pixels
    assert exit_status(["visualize", "curves", "--run", "a", "--out", "c.blp"]) == 2
    assert "error: c.blp: this format cannot hold the page" in capsys.readouterr().err and not Path("c.blp").exists()
    # two runs of the same name are named by their paths, and a run given twice is drawn once
    (folder / "other" / "a").mkdir(parents=True)
    (folder / "other" / "a" / "metrics.jsonl").write_text((folder / "a" / "metrics.jsonl").read_text())
    sizes = []
    for runs in (["a"], ["a", "./a", str(folder / "a")], ["a", "other/a"]):
        assert exit_status(["visualize", "curves", "--run", *runs, "--out", "same.png"]) == 0
        sizes.append(Image.open("same.png").height)
    assert sizes[0] == sizes[1] < sizes[2]
    page = np.asarray(Image.open("c.png"))
    for colour in ((0, 114, 178), (213, 94, 0)):
        assert (page == colour).all(-1).sum() > 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pca", "--out", "x.txt"], "x.txt has no image suffix, such as .png"),
        (["similarity", "--out", "x.png", "--patch", "7"], "'7' is not a patch as ROW,COL, such as 7,7"),
        (["similarity", "--out", "x.png", "--patch", "7,x"], "'7,x' is not a patch"),
    ],
)
def test_invalid_arguments_are_rejected_before_any_work(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["visualize", *arguments, "--weights", "nowhere", "--image", "wide.png"]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_failed_write_is_a_one_line_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for out, reason in (("/proc/nowhere/p.png", "No such file or directory"), ("wide.png/p.png", "File exists")):
        assert exit_status(["visualize", "pca", "--weights", "weights", "--image", "wide.png", "--out", out]) == 2
        assert capsys.readouterr().err == f"error: cannot write {out} ({reason}); choose another --out\n"
