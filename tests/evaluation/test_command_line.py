"""``visualize`` and ``evaluate`` with a network of a preset's head width, with and without the CPU kernels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from fork_server import run_forked
from PIL import Image
from tiny_backbone import class_folder

ROOT = Path(__file__).resolve().parents[2]
# head width 64 and an MLP width that the fused branches support
NETWORK = {"model": {"dim": 384, "depth": 2, "num_heads": 6}, "crops": {"global_size": 64, "local_size": 32}}
# runs a script of tools/ with the kernels switched on or off
RUN = """
import runpy, sys
from streamtrain.ops.cpu import build
build.set_enabled(sys.argv.pop(1) == "on")
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command_line")
    (folder / "network.yaml").write_text(json.dumps(NETWORK))
    class_folder(folder / "images", each=20)
    Image.effect_noise((90, 60), 80).convert("RGB").save(folder / "noise.png")
    return folder


def run_tool(folder: Path, tool: str, kernels: str, *arguments: str) -> str:
    script = str(ROOT / "tools" / f"{tool}.py")
    network = ["--untrained", "--config", "network.yaml"]
    command = ["-c", RUN, kernels, script, *arguments, *network]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_forked(command, environment, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["similarity", "pca", "attention"])
def test_pictures_do_not_depend_on_the_kernels(kind: str, folder: Path) -> None:
    pages = []
    for kernels in ("on", "off"):
        out = f"{kind}-{kernels}.png"
        stdout = run_tool(folder, "visualize", kernels, kind, "--image", "noise.png", "--size", "64", "--out", out)
        assert stdout.startswith(f"wrote {out}")
        pages.append(np.asarray(Image.open(folder / out)).astype(float))
    assert pages[0].shape == pages[1].shape and pages[0].std() > 10
    assert np.abs(pages[0] - pages[1]).mean() < 0.5


@pytest.mark.parametrize("task", ["knn", "linear", "logistic"])
def test_every_task_measures_the_same_with_and_without_kernels(task: str, folder: Path) -> None:
    if task == "logistic":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    results = []
    for kernels in ("on", "off"):
        stdout = run_tool(folder, "evaluate", kernels, task, "--train", "images", "--json", "--no-cache")
        results.append(json.loads(stdout.splitlines()[-1]))
    keys = {"knn": {"temperature", "knn_10", "knn_20"}, "linear": {"linear", "learning_rate"},
            "logistic": {"logistic", "penalty"}}[task]  # fmt: skip
    common = {"task", "features", "size", "step", "train", "test", "train_images", "test_images", "classes"} | {
        "largest_class"
    }
    scores = keys & {"knn_10", "knn_20", "linear", "logistic"}
    uncertainty = ("margin", "mean", "margin_mean", "spread", "real_difference")
    keys |= {f"{kind}_{score}" for kind in uncertainty for score in scores}
    assert results[0].keys() == keys | common | {"feature_dim", "feature_seconds", "splits"}
    for key in scores:
        # stripes in two directions: eight test images
        assert 0 <= results[0][key] <= 1 and abs(results[0][key] - results[1][key]) <= 1 / 8
