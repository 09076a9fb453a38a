"""Segmentation and depth in the evaluations of a run, on a network with heads of width 64 as in ``vits16.yaml``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mapped_folders import mapped_folder
from preset_shape import SHAPE, SHORT
from ranks import ROOT, run_ranks

from shards.packing.pack import PackOptions, pack
from shards.reading.shard_set import ShardSet

DENSE = {
    "eval/segmentation_knn_miou", "eval/segmentation_linear_miou", "eval/depth_rmse", "eval/depth_delta1",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unlabelled images, a set of them with maps and one without, and a run on the former."""
    folder = mapped_folder(tmp_path_factory.mktemp("online"), 40)
    pack(folder / "images", folder / "plain", PackOptions())
    pack(folder / "images", folder / "set", PackOptions(seg=folder / "masks", depth=folder / "depth"))
    train(folder, "run")
    return folder


def train(folder: Path, name: str, *words: str, shards: str = "set", ranks: int = 1) -> str:
    """Train for four steps; return what rank 0 printed."""
    given = [f"data.shards={folder / shards}", f"run.dir={folder / name}", "monitor.tensorboard=false"]
    every = ["evaluation.every=2", "evaluation.max_share=1.0", "monitor.panel_every=0", "monitor.histogram_every=0"]
    command = [str(ROOT / "streamtrain" / "main.py"), "--config", "vits16.yaml", *SHAPE, *SHORT, *given, *every, *words]
    results = run_ranks(command, ranks)
    assert [status for status, _, _ in results] == [0] * ranks, results[0][2][-3000:]
    assert not (folder / name / "tracebacks.log").exists(), results[0][2][-3000:]
    return results[0][1] + results[0][2]


def records(run: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def start(run: Path) -> dict[str, float]:
    values: dict[str, float] = json.loads((run / "baselines.json").read_text())["start"]
    return values


def test_a_set_with_maps_is_evaluated_without_labels(folder: Path) -> None:
    logged = records(folder / "run")
    assert set(start(folder / "run")) == DENSE
    assert "no evaluation by labels: data.shards has no labels" in (folder / "run" / "messages.log").read_text()
    for step in (2, 4):
        assert {tag for tag in logged[step] if tag.startswith("eval/")} == DENSE | {"eval/seconds", "eval/time_share"}
        assert 0.2 < logged[step]["eval/segmentation_linear_miou"] <= 1 and 0 < logged[step]["eval/depth_rmse"] < 2.5
    assert not DENSE & set(logged[3])


@pytest.mark.slow
def test_maps_change_nothing_of_the_training(folder: Path) -> None:
    printed = train(folder, "plain-run", shards="plain")
    assert "no evaluation of data.shards: data.shards has no labels" in printed
    expected, found = (
        [(line["slot"], line["loss/total"], line["optim/gradient_norm"]) for line in records(folder / name).values()]
        for name in ("plain-run", "run")
    )
    assert len(found) == 4 and found == expected


@pytest.mark.slow
def test_two_ranks_measure_the_same(folder: Path) -> None:
    train(folder, "two", "run.steps=2", ranks=2)
    # but for the order of the sum over ranks
    assert start(folder / "two") == pytest.approx(start(folder / "run"), rel=1e-14)


@pytest.mark.slow
def test_a_resumed_run_measures_the_same(folder: Path) -> None:
    shutil.copytree(folder / "run", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step-000000004")
    train(folder, "resumed", f"run.dir={folder / 'resumed'}")
    first, again = records(folder / "run")[4], records(folder / "resumed")[4]
    assert {tag: again[tag] for tag in DENSE} == {tag: first[tag] for tag in DENSE}


def test_a_damaged_map_costs_only_itself_and_evaluators_switch_it_off(folder: Path) -> None:
    shutil.copytree(folder / "set", folder / "damaged")
    shard_set = ShardSet.open(folder / "damaged")
    index = shard_set.map_index(0, "depth")
    assert index is not None
    with open(shard_set.tar_path(0), "r+b") as tar:
        for sample in range(0, 40, 2):
            tar.seek(int(index.record(sample)["offset"]) + 200)
            tar.write(b"xxx")
    printed = train(folder, "damaged-run", "run.steps=2", "evaluation.evaluators=[depth]", shards="damaged")
    assert "images left out of the evaluation: cannot use the depth map of image" in printed
    assert set(start(folder / "damaged-run")) == {"eval/depth_rmse", "eval/depth_delta1"}


def test_maps_of_too_few_images_are_reported(folder: Path) -> None:
    for path in list((folder / "masks" / "a").glob("*.png"))[1:]:
        path.unlink()
    pack(folder / "images", folder / "one", PackOptions(seg=folder / "masks"))
    printed = train(folder, "one-run", "run.steps=1", "evaluation.every=1", shards="one")
    assert "no segmentation of" in printed and "test images have a mask" in printed
