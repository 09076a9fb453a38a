"""Each alternative loss term of the first objective trains the quick start's network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from ranks import ROOT

from shards.packing.pack import PackOptions, pack
from streamtrain.reporting.metrics import read_metrics

STEPS = 50
FORMULAS = {
    # the centre needs a slower teacher, and the published ratio of teacher to student temperature
    "softmax centring": [
        "objective.centering=softmax", "schedules.momentum.peak=0.99", "schedules.teacher_temperature=0.0064",
    ],
    # a sum over 128 channels
    "L2": ["objective.patch_loss.kind=l2", "objective.patch_loss.weight=0.01"],
    "cosine": ["objective.patch_loss.kind=cosine"],
    "combined weights": [
        "objective.global_loss.weight=0.5", "objective.patch_loss.weight=2.0", "objective.koleo.weight=0.2",
    ],
    "EMA": ["schedules.momentum=0.95"],
}  # fmt: skip


def run(*words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def quickstart_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seed")
    run("tools/make_demo_images.py", "--out", folder / "images")
    pack(folder / "images", folder / "set", PackOptions())
    return folder / "set"


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_falls_and_nothing_collapses(name: str, quickstart_set: Path, tmp_path: Path) -> None:
    run(
        "streamtrain/main.py", "--config", "quickstart.yaml", f"data.shards={quickstart_set}", f"run.dir={tmp_path}",
        f"run.steps={STEPS}", "run.checkpoint_every=0", "schedules.freeze_last_layer=50", "schedules.lr.warmup=10",
        f"monitor.collapse.every={STEPS}", "monitor.progress=false",
        "evaluation.every=0", "monitor.panel_every=0", *FORMULAS[name],
    )  # fmt: skip
    records = list(read_metrics(tmp_path / "metrics.jsonl"))
    total = [record["loss/total"] for record in records]
    before, after = (records[index]["features/rank"] for index in (0, -1))
    print(f"{name}: loss {fmean(total[:5]):.3f} -> {fmean(total[-5:]):.3f}, rank {before:.1f} -> {after:.1f}")
    assert len(total) == STEPS and fmean(total[-5:]) < fmean(total[:5])
    assert after >= before / 2
