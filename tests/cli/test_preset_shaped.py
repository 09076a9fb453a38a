"""Every tool and every optional part of a run with a network of a preset's shape, with and without the CPU kernels.

Toy networks take other paths: the kernels of a block need widths of heads and MLP that are multiples of 32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import exit_status
from cpu_kernels import record_kernel_calls
from PIL import Image
from preset_shape import SHAPE, SHORT
from ranks import ROOT, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import class_folder

import streamtrain
from shards.packing.pack import PackOptions, pack
from streamtrain.ops.cpu import build
from streamtrain.reporting.metrics import read_metrics

# everything that draws or evaluates, more than once
EVERYTHING = (
    "evaluation.every=2", "evaluation.evaluators=[knn, linear, patches]", "evaluation.max_share=1.0",
    "evaluation.best=knn_20", "monitor.panel_every=2", "monitor.panel_samples=2", "monitor.histogram_every=2",
    "monitor.collapse.every=2", "monitor.profile={start: 2, steps: 1}", "run.snapshot_every=2",
    "optim.clip_per=module",
)  # fmt: skip
QUIET = ("evaluation.every=0", "monitor.tensorboard=false")
KERNELS = ("on", "off")


def train(folder: Path, name: str, *words: str) -> Path:
    """Train for four steps and return the run directory; no observer may fail."""
    given = [f"data.shards={folder / 'set'}", f"run.dir={folder / name}"]
    command = [str(ROOT / "streamtrain" / "main.py"), "--config", "vits16.yaml", *SHAPE, *SHORT, *given, *words]
    ((status, _, errors),) = run_ranks(command, 1)
    assert status == 0, errors[-3000:]
    assert not (folder / name / "tracebacks.log").exists(), errors[-3000:]
    assert len(list(read_metrics(folder / name / "metrics.jsonl"))) >= 1
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a class folder, its set, a photograph, and a run with each choice of kernels."""
    folder = tmp_path_factory.mktemp("preset_shaped")
    class_folder(folder / "images", each=20)
    pack(folder / "images", folder / "set", PackOptions())
    Image.effect_noise((150, 100), 80).convert("RGB").save(folder / "noise.png")
    for kernels in KERNELS:
        train(folder, f"run-{kernels}", *EVERYTHING, f"engine.cpu_kernels={str(kernels == 'on').lower()}")
    return folder


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Switch the kernels of this process on or off, in the folder."""
    monkeypatch.chdir(folder)
    build.set_enabled(request.param == "on")
    yield request.param
    build.set_enabled(True)


def call(*words: str) -> None:
    assert exit_status(words) == 0, words


def test_a_run_draws_and_evaluates_everything(folder: Path) -> None:
    results = []
    for kernels in KERNELS:
        events = EventAccumulator(str(folder / f"run-{kernels}" / "tensorboard"), size_guidance={"images": 0})
        events.Reload()
        tags = events.Tags()
        assert {"data/crops", "features/pca", "features/similarity"} <= set(tags["images"])
        assert "teacher/prototype_mass" in tags["histograms"]
        assert (folder / f"run-{kernels}" / "tensorboard" / "projector" / "latest.tsv").is_file()
        assert list((folder / f"run-{kernels}" / "profile").iterdir())
        last = list(read_metrics(folder / f"run-{kernels}" / "metrics.jsonl"))[-1]
        assert {"eval/knn_20", "eval/linear", "eval/patch_retrieval", "features/rank"} <= set(last)
        results.append(last)
    for tag in ("loss/total", "loss/global", "loss/patch", "loss/koleo"):
        assert results[0][tag] == pytest.approx(results[1][tag], rel=1e-3), tag


SOURCES = {
    "run": ["--run", "run-on"],
    "student": ["--run", "run-off", "--student"],
    "best": ["--run", "run-on", "--step", "best"],
    "untrained": ["--untrained", "--run", "run-on"],
    "hf": ["--weights", "weights-hf"],
    "timm": ["--weights", "weights-timm"],
    "safetensors": ["--weights", "weights-safetensors"],
}
PICTURES = {
    "similarity": ["similarity", "--patch", "0,0", "3,4"],
    "pca": ["pca", "--smooth"],
    "foreground": ["pca", "--foreground"],
    "attention": ["attention"],
}


@pytest.fixture(scope="module")
def exports(folder: Path) -> None:
    for kind in ("hf", "timm", "safetensors"):
        if kind == "hf":
            pytest.importorskip("transformers", reason="transformers is not installed")
        call("export", "--run", str(folder / "run-on"), "--to", kind, "--out", str(folder / f"weights-{kind}"))


@pytest.mark.parametrize(
    ("picture", "source"),
    [
        *(("attention", source) for source in SOURCES),
        *((picture, "run") for picture in PICTURES if picture != "attention"),
    ],
)
@pytest.mark.usefixtures("exports")
def test_pictures_of_every_network(picture: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    pages = []
    for kernels in KERNELS:
        build.set_enabled(kernels == "on")
        called = record_kernel_calls(monkeypatch.setattr)
        words = [*PICTURES[picture], *SOURCES[source], "--image", "noise.png", "--size", "96", "--device", "cpu"]
        try:
            call("visualize", *words, "--out", "page.png")
        finally:
            build.set_enabled(True)
        assert bool(called) == (kernels == "on" and build.load(torch.float32))
        pages.append(np.asarray(Image.open("page.png")).astype(float))
    assert pages[0].shape == pages[1].shape and pages[0].std() > 10
    assert np.abs(pages[0] - pages[1]).mean() < 0.5


def test_crops_curves_and_report(kernels: str) -> None:
    run = f"run-{kernels}"
    call("visualize", "crops", "--run", run, "--image", "noise.png", "--draws", "2", "--out", "crops.png")
    call("visualize", "curves", "--run", run, "--out", "curves.png")
    call("report", "--run", run, "--out", "report.html")
    assert all(np.asarray(Image.open(name)).std() > 5 for name in ("crops.png", "curves.png"))
    assert "<img" in Path("report.html").read_text() or "data:image" in Path("report.html").read_text()


@pytest.mark.parametrize("task", ["knn", "linear", "logistic"])
@pytest.mark.parametrize("source", ["best", "student"])
def test_evaluation(task: str, source: str, kernels: str, capsys: pytest.CaptureFixture[str]) -> None:
    if task == "logistic":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    call("evaluate", task, *SOURCES[source], "--train", "images", "--device", "cpu", "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["task"] == task and 0 <= result["knn_10" if task == "knn" else task] <= 1


def test_features_of_the_python_api(kernels: str, folder: Path) -> None:
    backbone = streamtrain.load_backbone(folder / f"run-{kernels}", step="best")
    features, keys = streamtrain.embed(backbone, folder / "set", device="cpu")
    assert features.shape == (40, 128) and len(set(keys)) == 40
    images = sorted((folder / "images").glob("*/*.png"))
    alone = backbone.forward_features(backbone.preprocess(images)).cls.numpy()
    np.testing.assert_allclose(np.sort(alone, 0), np.sort(features, 0), rtol=1e-3, atol=1e-3)
    layers = backbone.model.get_intermediate_layers(backbone.preprocess(images[:2]), 2)
    assert [layer.patches.shape for layer in layers] == [(2, 16, 128)] * 2


# further stages and options of training
STAGES = {
    "gram": ["objective.gram={weight: 1.0, size: 96, refresh: {first: 2, every: 1}}",
             "crops.sizes=[{share: 0.5}, {share: 0.5, global_size: 96, gram_size: 128}]"],
    "rectangles": ["crops.global_size=[64, 96]", "crops.local_size=[32, 48]", "monitor.tensorboard=true",
                   "monitor.panel_every=2", "evaluation.every=2", "evaluation.max_share=1.0", "model.rope_jitter=1.5",
                   "objective.gram={weight: 1.0, size: [128, 192]}"],
    "distill": ["teacher.kind=frozen", "teacher.weights=RUN", "model.dim=64", "model.num_heads=1"],
    "init": ["init.weights=RUN", "init.freeze_backbone_steps=2"],
    "recompute": ["engine.checkpointing=selective", "engine.view_groups=2", "engine.moments=disk",
                  "engine.moments_ratio=0.5"],
    "swiglu": ["model.mlp=swiglu", "model.mlp_hidden=256", "model.untied_norms=local_cls", "model.rope_rescale=2.0",
               "objective.centering=softmax"],
    "bf16": ["engine.dtype=bf16", "evaluation.every=2", "evaluation.max_share=1.0"],
    "fp8": ["engine.dtype=bf16", "engine.fp8=true"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "kernels"),
    [
        pytest.param(stage, kernels, marks=[] if (stage, kernels) == ("distill", "off") else pytest.mark.slow)
        for stage in STAGES
        for kernels in KERNELS
    ],
)
def test_stages_of_training(stage: str, kernels: str, folder: Path) -> None:
    words = [word.replace("RUN", str(folder / "run-on")) for word in STAGES[stage]]
    train(folder, f"{stage}-{kernels}", *QUIET, f"engine.cpu_kernels={str(kernels == 'on').lower()}", *words)


def test_config_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    call("config", "--help")
    assert capsys.readouterr().out.startswith("usage: streamtrain config")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_script_of_tools_has_a_help(script: str, tmp_path: Path) -> None:
    if script in ("demo_images.py", "demo_pairs.py"):
        pytest.skip("a module of make_demo_images.py, without a command line")
    command = [sys.executable, str(ROOT / "tools" / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and len(done.stdout) > 200, done.stderr
