"""The demo set: reproducible by seed, and separable only by structure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from demo_images import CLASSES, WALL, draw  # noqa: E402
from make_demo_images import make_demo_images, write_images  # noqa: E402


def make(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "make_demo_images.py"), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent, timeout=120)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "set"
    assert make_demo_images(out, 600, 96, 0, 2, progress=False)
    return out


def pixels(folder: Path, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images as float32 [N, side * side * 3] and class numbers [N], in index order."""
    files = sorted(folder.glob("*/*.jpg"), key=lambda file: file.stem)
    images = [Image.open(file).resize((side, side), Image.Resampling.BOX) for file in files]
    names = list(CLASSES)
    labels = np.array([names.index(file.parent.name) for file in files])
    return np.stack([np.asarray(image, np.float32) / 255 for image in images]).reshape(len(files), -1), labels


def test_ten_balanced_classes_of_varied_sizes(demo: Path) -> None:
    counts = {folder.name: len(list(folder.glob("*.jpg"))) for folder in demo.iterdir() if folder.is_dir()}
    assert counts == dict.fromkeys(CLASSES, 60)
    sizes = {Image.open(file).size for file in demo.glob("*/*.jpg")}
    assert len(sizes) > 50 and all(80 <= side <= 112 for size in sizes for side in size)


def test_mean_colour_does_not_separate_classes(demo: Path) -> None:
    colours, labels = pixels(demo, 1)
    train = np.arange(len(labels)) < 400
    means = np.stack([colours[train & (labels == label)].mean(0) for label in range(len(CLASSES))])
    nearest = np.linalg.norm(colours[~train, None] - means, axis=-1).argmin(1)
    assert (nearest == labels[~train]).mean() < 0.2


def test_raw_pixels_hardly_separate_classes(demo: Path) -> None:
    images, labels = pixels(demo, 32)
    images -= images.mean(1, keepdims=True)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    nearest = np.argsort(-images[400:] @ images[:400].T, axis=1)[:, :20]
    votes = np.apply_along_axis(np.bincount, 1, labels[:400][nearest], minlength=len(CLASSES))
    # chance is 0.1; raw pixels only match textures that happen to be aligned
    assert (votes.argmax(1) == labels[400:]).mean() < 0.4


def test_bytes_depend_on_the_seed_and_not_on_the_split(demo: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
    write_images(tmp_path, None, 0, 96, range(37, 43))
    for file in tmp_path.glob("*/*.jpg"):
        assert file.read_bytes() == (demo / file.parent.name / file.name).read_bytes()
    first, second = (draw("striped_disc", np.random.default_rng([seed, 0]), 64, 64) for seed in (0, 1))
    assert not np.array_equal(first.image, second.image)


def test_masks_and_depth_are_those_of_the_images(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    images = tmp_path / "images"
    assert make_demo_images(images, 30, 96, 0, 2, progress=False, labels=out)
    assert not make_demo_images(images, 30, 96, 0, 2, progress=False, labels=out)
    # labels are added to images of an earlier run, which are kept
    stamp = (images / ".demo.json").stat().st_mtime_ns
    shutil.rmtree(out)
    assert make_demo_images(images, 30, 96, 0, 2, progress=False, labels=out)
    assert (images / ".demo.json").stat().st_mtime_ns == stamp
    names = list(CLASSES)
    contrasts = []
    for path in sorted(out.glob("masks/*/*.png")):
        name = path.parent.name
        mask, depth = np.asarray(Image.open(path)), np.asarray(Image.open(out / "depth" / name / path.name))
        jpeg = images / name / f"{path.stem}.jpg"
        assert jpeg.read_bytes() == (demo / name / jpeg.name).read_bytes()
        image = np.asarray(Image.open(jpeg).convert("L"), np.float32)
        assert mask.shape == depth.shape == image.shape and depth.dtype == np.uint16
        assert set(np.unique(mask).tolist()) == {0, 1 + names.index(name)}
        assert (depth[mask == 0] == WALL).all() and 1200 < depth[mask > 0].max() < 2900
        contrasts.append(image[mask > 0].std() - image[mask == 0].std())
    assert len(contrasts) == 30
    # objects have dark and pale ink, the background a faint print
    assert np.mean(np.array(contrasts) > 10) > 0.9
    with pytest.raises(ValueError, match="is a different demo set"):
        make_demo_images(out, 30, 96, 0, 2, progress=False)


def test_points_of_pairs_show_the_same_place(tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    assert make_demo_images(out, 20, 96, 0, 1, progress=False, kind="pairs")
    lines = (out / "pairs.jsonl").read_text().splitlines()
    assert len(lines) > 15 and not list(out.glob("0*.json"))
    values, others = [], []
    for record in map(json.loads, lines):
        views = [
            np.asarray(Image.open(out / record[f"image_{letter}"]).convert("L").filter(ImageFilter.GaussianBlur(1)))
            for letter in "ab"
        ]
        places = [np.array(record[f"points_{letter}"]) for letter in "ab"]
        assert views[0].shape == (96, 96) and all(((part > 0) & (part < 96)).all() for part in places)
        a, b = (view[tuple(part.astype(int).T[::-1])] for view, part in zip(views, places, strict=True))
        values.append(np.stack([a, b]))
        others.append(np.stack([a, np.roll(b, 1)]))
    # exposure and noise differ, but bright places stay bright
    assert np.corrcoef(np.concatenate(values, 1))[0, 1] > 0.9 > 0.7 > np.corrcoef(np.concatenate(others, 1))[0, 1]


def test_a_finished_set_is_reused_and_a_different_one_raises(tmp_path: Path) -> None:
    out = tmp_path / "set"
    (tmp_path / "set.partial").mkdir()  # left by a killed run
    first = make(out, "--count", "20", "--size", "32", "--workers", "1")
    assert first.returncode == 0 and first.stdout.startswith("drew 20 images"), first.stderr
    assert not (tmp_path / "set.partial").exists()
    stamp = next(out.glob("*/*.jpg")).stat().st_mtime_ns
    again = make(out, "--count", "20", "--size", "32")
    assert again.returncode == 0 and again.stdout.startswith("found 20 images")
    assert next(out.glob("*/*.jpg")).stat().st_mtime_ns == stamp
    other = make(out, "--count", "30", "--size", "32")
    assert other.returncode == 2 and other.stderr.startswith("error: ") and other.stderr.count("\n") == 1
    nowhere = make(tmp_path, "--out", str(tmp_path / "set" / ".demo.json" / "below"))
    assert nowhere.returncode == 2 and nowhere.stderr.startswith("error: cannot write ")
    assert nowhere.stderr.count("\n") == 1 and "Errno" not in nowhere.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"x")
    mine = make(tmp_path / "mine", "--count", "20")
    assert mine.returncode == 2 and "not a demo set" in mine.stderr
    assert (tmp_path / "mine" / "photo.jpg").exists()
