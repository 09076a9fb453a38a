"""A run writes exactly the tags that docs/monitoring.md lists."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_images import packed_set
from faulty_server import faulty_server
from PIL import Image
from ranks import ROOT, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_backbone import class_folder, tiny_weights
from tiny_run import command

from shards.packing.pack import PackOptions, pack
from shards.reading.shard_set import ShardSet
from streamtrain.config.load import read_resolved
from streamtrain.evaluation.features import compute_features, pixel_features, read_pixels
from streamtrain.evaluation.held_out import held_out
from streamtrain.evaluation.knn import knn_accuracy
from streamtrain.evaluation.linear import linear_accuracy
from streamtrain.interop.folder import IMAGENET_MEAN, IMAGENET_STD
from streamtrain.interop.load import load_run

STEPS = 30
CLASSES = ("across", "down")
# every report, often; a collapse bound that no network meets; a large LayerScale, without which rounding decides the
# nearest neighbours of a new network's nearly equal features
EVERYTHING = (
    f"run.steps={STEPS}", "monitor.tensorboard=true", "monitor.panel_every=20", "monitor.histogram_every=10",
    "monitor.peak_flops=1e12", "monitor.collapse={every: 2, start: 1, min_rank: 1.0}", "optim.clip_per=module",
    "objective.gram.weight=1.0", "objective.anchor.weight=0.1", "evaluation.every=10",
    "evaluation.evaluators=[knn, linear, patches, segmentation, depth]", "evaluation.max_share=1.0",
    "evaluation.best=knn_20",
    "monitor.profile={start: 2, steps: 1}",
    "run.checkpoint_every=5", "run.keep_last=1", "schedules.lr=1e-3", "model.layerscale=0.5",
)  # fmt: skip


def documented() -> dict[str, set[str]]:
    """Return the tags in tables of the documentation by heading."""
    tags: dict[str, set[str]] = {}
    heading = ""
    for line in (ROOT / "docs" / "monitoring.md").read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| `"):
            tags.setdefault(heading, set()).update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return tags


def mapped_set(folder: Path, images: Path) -> Path:
    """Pack images with masks of two classes and with depth."""
    for path in sorted(images.rglob("*.*")):
        width, height = Image.open(path).size
        halves = np.arange(width) >= width // 2
        for name in ("masks", "depth"):
            (folder / name / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.tile(halves.astype(np.uint8), (height, 1))).save(
            folder / "masks" / path.parent.name / f"{path.stem}.png"
        )
        depth = np.tile(np.where(halves, 1.0, 3.0).astype(np.float32), (height, 1))
        np.save(folder / "depth" / path.parent.name / f"{path.stem}.npy", depth)
    pack(images, folder / "labelled", PackOptions(seg=folder / "masks", depth=folder / "depth"))
    return folder / "labelled"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("monitoring")
    packed_set(folder, 40, shard_bytes=8_000)
    labelled = mapped_set(folder, class_folder(folder / "images of classes", CLASSES, each=20))
    with faulty_server(folder) as server:
        shards = f"{server.url}/set"
        cache = f"data.cache={{dir: {folder / 'cache'}, limit: 1MB}}"
        start = (f"init.weights={tiny_weights(folder / 'weights')}", f"evaluation.reference={labelled}")
        words = command(shards, folder / "run", *EVERYTHING, cache, f"evaluation.train={labelled}", *start)
        results = run_ranks(words, 2)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-3000:]
    assert "is disabled" not in results[0][2]
    return folder / "run"


def test_logged_tags_are_the_documented_tags(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    found = documented()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {tag for record in records for tag in record} - {"step", "slot"}
    # logged only if an image is unusable
    assert set(tags["scalars"]) == found["Scalars"] - {"eval/unusable_images", "reference/unusable_images"} == logged
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"] if tag.endswith("/text_summary")}
    shown = {*tags["images"], *tags["histograms"], *texts}
    # the documentation lists the first block only
    assert {tag for tag in shown if "block_" not in tag or "block_00" in tag} == found["Pictures, histograms, text"]
    assert len(records) == STEPS and {"custom_scalars__config__", "_hparams_/session_start_info"} <= {
        *tags["tensors"], *events.summary_metadata,
    }  # fmt: skip


def test_pictures_are_drawn_at_their_interval_at_the_start_and_at_the_end(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("data/crops")] == [1, 20, 30]
    for tag in ("features/pca", "features/similarity"):
        images = events.Images(tag)
        assert [image.step for image in images] == [0, 20, 30]
        assert images[0].encoded_image_string != images[-1].encoded_image_string
    assert sorted(path.name for path in (run / "tensorboard" / "projector").glob("*.tsv")) == [
        "first-labels.tsv", "first.tsv", "latest-labels.tsv", "latest.tsv",
    ]  # fmt: skip
    labels = (run / "tensorboard" / "projector" / "latest-labels.tsv").read_text().split()
    assert set(labels) == set(CLASSES) and len(labels) == 4  # rank 0's half of a fifth of 40


def test_the_network_at_step_0_and_the_pixels_are_evaluated(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    baselines = json.loads((run / "baselines.json").read_text())
    for tag in ("eval/knn_10", "eval/knn_20", "eval/linear", "eval/patch_retrieval"):
        values = {event.step: event.value for event in events.Scalars(tag)}
        assert list(values) == [0, 10, 20, 30] and values[0] == pytest.approx(baselines["start"][tag])
    images, _ = held_out(read_resolved(run), ShardSet.open(run.parent / "set"))
    assert images is not None and (baselines["train_images"], baselines["test_images"]) == (32, 8)
    sets = [
        (pixel_features(read_pixels(each, size=32)[0], IMAGENET_MEAN, IMAGENET_STD), torch.from_numpy(each.labels))
        for each in (images.train, images.test)
    ]
    expected = knn_accuracy(*sets[0], *sets[1])
    assert {f"eval/knn_{count}": value for count, value in expected.items()} == pytest.approx(baselines["pixels"])


def test_evaluation_on_two_ranks_agrees_with_the_checkpoint_on_one(run: Path) -> None:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval/knn_20" in record] == [10, 20, 30]
    config, backbone = read_resolved(run), load_run(run)
    images, _ = held_out(config, ShardSet.open(run.parent / "set"))
    assert images is not None and backbone.config.origin["step"] == STEPS
    crops = {"size": config.square_side, "mean": config.crops.mean, "std": config.crops.std}
    train, test = (
        (compute_features(backbone.model, each, **crops)[0], torch.from_numpy(each.labels))
        for each in (images.train, images.test)
    )
    expected = knn_accuracy(*train, *test)
    assert {count: records[-1][f"eval/knn_{count}"] for count in (10, 20)} == pytest.approx(expected)
    assert records[-1]["eval/linear"] == pytest.approx(linear_accuracy(*train, *test).accuracy, abs=0.13)


def test_the_best_checkpoint_is_kept(run: Path) -> None:
    best = json.loads((run / "best.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = {record["step"]: record["eval/knn_20"] for record in records if "eval/knn_20" in record}
    first_best = next(step for step, value in values.items() if value == max(values.values()))
    assert best == {"step": first_best, "metric": "knn_20", "value": values[first_best]}
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == sorted({f"step-{first_best:09d}", f"step-{STEPS:09d}"})


def test_the_selected_steps_are_traced(run: Path) -> None:
    traces = sorted(path.name for path in (run / "profile").iterdir())
    assert traces == [f"steps-2-2-rank-{rank}.json.gz" for rank in range(2)]
    with gzip.open(run / "profile" / traces[0]) as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert "aten::addmm" in names
