"""Pictures from a tiny exported network, as users make them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_backbone import class_folder, tiny_weights

from streamtrain.reporting.metrics import MetricsLog

TOOL = Path(__file__).resolve().parents[2] / "tools" / "visualize.py"


def visualize(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visualize")
    class_folder(folder / "images", each=1)
    Image.effect_noise((90, 60), 80).convert("RGB").save(folder / "wide.png")
    tiny_weights(folder / "weights")
    return folder


def red_cross(page: np.ndarray) -> np.ndarray:
    return np.argwhere((page == (230, 30, 40)).all(-1))


def test_similarity_page(place: Path) -> None:
    images = ["wide.png", "images/down/000.png"]
    done = visualize(
        place, "similarity", "--weights", "weights", "--image", *images, "--patch", "0,0", "3,5", "--out", "s.png"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote s.png")
    page = np.asarray(Image.open(place / "s.png"))
    assert page.shape[0] > 900 and page.shape[1] > 1800
    assert len(red_cross(page)) > 4 * 100  # on image and map, for each patch


def test_pca_page(place: Path) -> None:
    done = visualize(
        place, "pca", "--weights", "weights/model.safetensors", "--image", "wide.png", "--size", "64", "--smooth",
        "--out", "new/p.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = np.asarray(Image.open(place / "new" / "p.png"))
    assert page.shape[0] > 480 and page.shape[1] > 1200 and len(red_cross(page)) == 0
    assert len(np.unique(page.reshape(-1, 3), axis=0)) > 1000


def test_several_patches_of_one_image_stand_in_a_grid(place: Path) -> None:
    patches = ["0,0", "3,5", "7,1"]
    done = visualize(
        place, "similarity", "--weights", "weights", "--image", "wide.png", "--size", "64", "--patch", *patches,
        "--out", "g.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = np.asarray(Image.open(place / "g.png"))
    assert page.shape[0] > 2 * 400 and 2 * 600 < page.shape[1] < 3 * 600
    assert len(red_cross(page)) > 6 * 100  # each on the image and on its map


def test_crops_page_of_an_image(place: Path) -> None:
    done = visualize(place, "crops", "--config", "quickstart.yaml", "--image", "wide.png", "--draws", "2",
                     "--out", "c.png", "crops.local_count=0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(place / "c.png")).shape[0] > 250
    done = visualize(place, "crops", "--image", "wide.png", "--out", "c.png")
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
def test_every_mistake_is_named(
    place: Path, arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(TOOL.parent))
    command = ["visualize.py", "similarity", "--weights", "weights", *arguments, "--out", "x.png"]
    monkeypatch.setattr(sys, "argv", command)
    assert importlib.import_module("visualize").main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (place / "x.png").exists()


def test_attention_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(TOOL.parent))
    images = ["--image", "wide.png", "images/down/000.png"]
    command = ["visualize.py", "attention", "--weights", "weights", *images, "--out", "a.png"]
    monkeypatch.setattr(sys, "argv", command)
    assert importlib.import_module("visualize").main() == 0
    page = np.asarray(Image.open("a.png"))
    assert page.shape[0] > 2 * 200 and page.shape[1] > 4 * 300  # image, mean and two heads of a wide image


def test_curves_page(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, start in (("a", 5), ("b", 9)):
        (place / name).mkdir()
        log = MetricsLog(place / name / "metrics.jsonl")
        for step in range(1, 30):
            log.write(step, step, {"loss/total": start / step, "optim/gradient_norm": float("nan")})
        log.close()
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(TOOL.parent))
    main = importlib.import_module("visualize").main
    for runs, out, code in ((["a", "b"], "c.png", 0), (["a", "weights"], "none.png", 2)):
        monkeypatch.setattr(sys, "argv", ["visualize.py", "curves", "--run", *runs, "--out", out])
        assert main() == code
    assert "error: weights is not a run directory" in capsys.readouterr().err
    page = np.asarray(Image.open("c.png"))
    for colour in ((0, 114, 178), (213, 94, 0)):
        assert (page == colour).all(-1).sum() > 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pca", "--out", "x.txt"], "--out x.txt has no suffix of an image"),
        (["similarity", "--out", "x.png", "--patch", "7"], "'7' is not a patch as ROW,COL, such as 7,7"),
        (["similarity", "--out", "x.png", "--patch", "7,x"], "'7,x' is not a patch"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    monkeypatch.setattr(sys, "argv", ["visualize.py", *arguments, "--weights", "nowhere", "--image", "wide.png"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("visualize").main()
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_page_that_cannot_be_written_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(TOOL.parent))
    for out, reason in (("/proc/nowhere/p.png", "No such file or directory"), ("wide.png/p.png", "File exists")):
        command = ["visualize.py", "pca", "--weights", "weights", "--image", "wide.png", "--out", out]
        monkeypatch.setattr(sys, "argv", command)
        assert importlib.import_module("visualize").main() == 2
        assert capsys.readouterr().err == f"error: cannot write {out} ({reason}); choose another --out\n"
