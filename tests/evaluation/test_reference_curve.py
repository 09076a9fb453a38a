"""Stored curves of healthy runs: they fit today's recipes and tags, and are drawn in reports of runs with a recipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import exit_status
from ranks import ROOT

from streamtrain.config.load import load_config, preset_folders
from streamtrain.config.recipes import changed_settings
from streamtrain.evaluation.reference_curve import MAX_POINTS, find_comparison, read_curves, stored_curves
from streamtrain.evaluation.verdict import KnownBaselines
from streamtrain.run.directory import describe_run
from streamtrain.run.tags import TAGS

STORED = stored_curves()
MAX_BYTES = 30_000


def write_run(run: Path, *settings: str, images: dict[str, str] | None = None, until: int | None = None) -> Path:
    """Write a run directory of ``quickstart.yaml`` with a falling loss and rising accuracy."""
    config = load_config("quickstart.yaml", ["data.shards=sets/photos", *settings])
    run.mkdir()
    describe_run(run, config, 1, {"device": "cpu", "dtype": "fp32", "images": 600})
    records = []
    for step in range(1, (until or config.run.steps) + 1):
        record = {"step": step, "slot": 32 * step, "loss/total": 4 + 3 / step, "speed/step_seconds": 1.0}
        if step % 20 == 0:
            record |= {"features/rank": 12.0, "features/std": 0.8, "teacher/entropy": 4.0, "eval/knn_20": 0.5}
        records.append(record)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    baselines = {"start": {"eval/knn_20": 0.2}, "pixels": {}, "test_images": 100, "images": images or {}}
    (run / "baselines.json").write_text(json.dumps(baselines))
    return run


def report(run: Path) -> str:
    assert exit_status(["report", "--run", run]) == 0
    return (run / "report.html").read_text()


def chart(page: str, title: str) -> str:
    (found,) = (each for each in page.split("<figure")[1:] if f'aria-label="{title}:' in each)
    return found


def store(run: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "bench.py", "reference", "--run", run, "--images", "600 photos"]
    return subprocess.run([*command, "--out", out, *more], capture_output=True, text=True)


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_curves_fit_todays_recipes_and_tags(path: Path) -> None:
    curves = read_curves(path)
    assert path.stat().st_size <= MAX_BYTES and path.stem == Path(curves.recipe).stem
    assert (preset_folders()[0] / curves.recipe).is_file()
    # the settings are accepted, and give the run of the file
    assert curves.config.run.steps == curves.steps and curves.config.run.seed == curves.seed
    assert curves.curves.keys() <= TAGS.keys()
    assert {"loss/total", "features/rank", "teacher/entropy", "eval/knn_20"} <= curves.curves.keys()
    assert curves.command.startswith(f"streamtrain train --config {curves.recipe}") and curves.versions["torch"]
    assert re.fullmatch("[0-9a-f]{40}", curves.commit or "") and curves.images and curves.identities["eval"]
    for steps, values in curves.curves.values():
        assert 1 < len(steps) == len(values) <= MAX_POINTS
        assert steps == sorted(set(steps)) and steps[0] >= 0 and steps[-1] <= curves.steps


def test_the_quick_start_is_compared_with_a_healthy_run(tmp_path: Path) -> None:
    (quickstart,) = (read_curves(path) for path in STORED if path.stem == "quickstart")
    page = report(write_run(tmp_path / "same", images=dict(quickstart.identities)))
    assert f"Grey: a healthy run of quickstart.yaml, 300 steps on {quickstart.images}." in page
    assert all('class="reference"' in chart(page, title) for title in ("Loss", "kNN accuracy (k = 20)"))
    assert 'class="reference"' not in chart(page, "Step time")
    # twice as long, on other images, with other heads, and not complete
    page = report(write_run(tmp_path / "long", "run.steps=600", "objective.student_temperature=0.1", until=300))
    assert "as a share of its steps (this run has 600)" in page and "Some curves of eval, loss, teacher" in page
    assert not any('class="reference"' in chart(page, title) for title in ("Loss", "kNN accuracy (k = 20)"))
    points = re.search(r'class="reference" points="([^"]*)"', chart(page, "Spread of the features"))
    assert points and all(0 <= int(pair.split(",")[0]) <= 1000 for pair in points[1].split())
    assert points[1].split()[0].startswith("0,") and points[1].split()[-1].startswith("1000,")


def test_curves_of_another_range_or_of_other_images_are_left_out() -> None:
    comparison = find_comparison(load_config("continue.yaml", ["data.shards=set", "init.weights=w"]), KnownBaselines())
    assert comparison is not None and comparison.reference.recipe == "continue.yaml"
    drawn = {tag for tag in comparison.reference.curves if comparison.line(tag) is not None}
    assert {"loss/total", "loss/anchor", "teacher/entropy", "drift/reference/cka"} <= drawn
    # of a narrower network, and accuracies
    assert not drawn & {"features/rank", "optim/gradient_norm", "eval/knn_20", "drift/reference/knn_20"}


def test_a_recipe_without_a_stored_run_has_no_grey_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    describe_run(run, load_config("giant.yaml", ["data.shards=sets/photos"]), 1, {"device": "cpu"})
    page = report(run)
    assert "Grey:" not in page and 'class="reference"' not in page


def test_the_curves_of_a_run_are_stored_with_its_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "run.steps=80", "optim.betas=[0.9, 0.99]")
    done = store(run, tmp_path / "curves.json", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["recipe"] == "quickstart.yaml"
    curves = read_curves(tmp_path / "curves.json")
    assert curves.settings == {"run.steps": 80, "optim.betas": [0.9, 0.99]} and curves.images == "600 photos"
    config = load_config("quickstart.yaml", ["run.steps=80", "optim.betas=[0.9, 0.99]"])
    assert not changed_settings(curves.config, config)
    steps, values = curves.curves["loss/total"]
    assert (steps[0], steps[-1], values[0], len(steps)) == (1, 80, 7, MAX_POINTS)
    assert curves.curves["eval/knn_20"] == [[0, 20, 40, 60, 80], [0.2, 0.5, 0.5, 0.5, 0.5]]
    assert "speed/step_seconds" not in curves.curves


def test_only_complete_healthy_runs_are_stored(tmp_path: Path) -> None:
    for run, words in (
        (write_run(tmp_path / "short", until=50), "not complete: it needs 300 steps"),
        (write_run(tmp_path / "early", "run.steps=40"), "not healthy: Too early"),
    ):
        done = store(run, tmp_path / "curves.json")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not (tmp_path / "curves.json").exists()
