"""Linear CKA, features saved at the start, and runs that stop when they lose their start."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_images import packed_set
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_processes import run_on_ranks
from ranks import run_ranks
from tiny_backbone import class_folder, tiny_weights
from tiny_run import command

from streamtrain.engine.runtime import Launch, Runtime
from streamtrain.evaluation.drift import StartFeatures, linear_cka, mean_distance
from streamtrain.evaluation.knn import Rows
from streamtrain.evaluation.verdict import KnownBaselines, judge_drift
from streamtrain.ops.collectives import SharedFailure


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(3, 40), dim=st.integers(1, 12), other=st.integers(1, 12),
    scale=st.sampled_from([1e-3, 1.0, 50.0]), shift=st.sampled_from([0.0, 10.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_cka_is_symmetric_bounded_and_invariant(
    count: int, dim: int, other: int, scale: float, shift: float, seed: int
) -> None:
    first, second = random(count, dim, seed=seed), random(count, other, seed=seed + 1)
    value = linear_cka(first, second)
    assert 0.0 <= value <= 1.0 + 1e-9 and linear_cka(second, first) == pytest.approx(value, abs=1e-9)
    rotation, _ = torch.linalg.qr(random(dim, dim, seed=seed + 2).double())
    moved = scale * first.double() @ rotation + shift
    assert linear_cka(moved, second) == pytest.approx(value, abs=1e-6)
    assert linear_cka(first, moved) == pytest.approx(1.0, abs=1e-6)


def test_cka_equals_the_formula_of_gram_matrices() -> None:
    first, second = random(20, 5).double(), random(20, 7, seed=1).double()
    centre = torch.eye(20, dtype=torch.float64) - 1 / 20
    left, right = (centre @ one @ one.T @ centre for one in (first, second))
    assert linear_cka(first, second) == pytest.approx(float((left * right).sum() / left.norm() / right.norm()))
    assert linear_cka(torch.ones(4, 3), random(4, 3)) == 0.0
    # orthogonal after centring
    assert linear_cka(torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([[1.0], [1.0], [-2.0]])) < 1e-12


def test_distance_is_zero_for_scaled_and_two_for_opposite_features() -> None:
    features = random(6, 4)
    assert mean_distance(features, 3.0 * features) == pytest.approx(0.0, abs=1e-6)
    assert mean_distance(features, -features) == pytest.approx(2.0)


@dataclass(frozen=True)
class Part:
    """This rank's features of a train and a test set."""

    train: Rows
    test: Rows
    counts: tuple[int, int]
    identity: str = "these images"


def part_of(features: tuple[torch.Tensor, torch.Tensor], rank: int, ranks: int) -> Part:
    rows = []
    for whole in features:
        indices = rank + ranks * torch.arange(-(-len(whole) // ranks))
        labels = torch.zeros(len(indices), dtype=torch.int64).where(indices < len(whole), torch.tensor(-1))
        rows.append(Rows(whole[indices.clamp(max=len(whole) - 1)], labels))
    return Part(rows[0], rows[1], (len(features[0]), len(features[1])))


def store(folder: Path, rank: int, ranks: int) -> StartFeatures:
    runtime = Runtime(Launch(rank, ranks, rank, ranks), torch.device("cpu"), torch.float32)
    return StartFeatures(folder, runtime, SharedFailure(60.0))


START = random(9, 4), random(5, 4, seed=1)
NOW = START[0] + 0.3 * random(9, 4, seed=2), START[1] + 0.3 * random(5, 4, seed=3)


def save_and_compare(rank: int, folder: str) -> None:
    """On two ranks, with an odd number of images."""
    features = store(Path(folder), rank, 2)
    features.save({"eval": part_of(START, rank, 2)})
    torch.distributed.barrier()
    found = features.compare("eval", part_of(NOW, rank, 2))
    assert found["cka"] == pytest.approx(linear_cka_of_all()) and found["distance"] > 0.0


def linear_cka_of_all() -> float:
    first, second = (torch.cat(one).double() for one in (START, NOW))
    first, second = first - first.mean(0), second - second.mean(0)
    return float((first.T @ second).square().sum() / (first.T @ first).norm() / (second.T @ second).norm())


def test_features_of_step_0_are_read_on_another_number_of_ranks(tmp_path: Path) -> None:
    run_on_ranks(save_and_compare, tmp_path, str(tmp_path))
    alone = store(tmp_path, 0, 1)
    found = alone.compare("eval", part_of(NOW, 0, 1))
    assert found["cka"] == pytest.approx(linear_cka_of_all())
    assert alone.compare("eval", part_of(START, 0, 1))["distance"] == pytest.approx(0.0, abs=1e-6)
    # other images than at step 0, as many or fewer; another set, and a damaged file
    assert alone.compare("eval", replace(part_of(NOW, 0, 1), identity="others")) == {}
    assert alone.compare("eval", part_of((NOW[0][:8], NOW[1]), 0, 1)) == {}
    assert alone.compare("reference", part_of(NOW, 0, 1)) == {}
    (tmp_path / "start_features.safetensors").write_bytes(b"damaged")
    assert alone.compare("eval", part_of(NOW, 0, 1)) == {}


@pytest.mark.parametrize(("value", "change", "kind"), [(0.8, 0.0, "good"), (0.77, -0.03, "open"), (0.6, -0.2, "bad")])
def test_the_report_judges_the_reference(value: float, change: float, kind: str) -> None:
    record = {"step": 5, "reference/knn_20": value, "drift/reference/knn_20": change, "drift/reference/cka": 0.9}
    finding = judge_drift([record], KnownBaselines())
    assert finding is not None and finding.kind == kind and "reference: kNN 80.0% →" in finding.text
    assert judge_drift([{"step": 5, "eval/knn_20": 0.5}], KnownBaselines()) is None


@pytest.mark.slow
def test_a_run_that_loses_its_start_stops_after_a_checkpoint_and_names_the_best(tmp_path: Path) -> None:
    shards, weights = packed_set(tmp_path, 40).path, tiny_weights(tmp_path / "weights")
    labelled, plain = class_folder(tmp_path / "labelled", ("c", "d"), each=60), tmp_path / "plain"
    shutil.copytree(labelled / "c", plain)
    given = [
        "run.steps=20", f"init.weights={weights}", "evaluation={every: 1, max_share: 1.0, best: knn_20}",
        "evaluation.stop_if_below=0.9", f"evaluation.train={labelled}", f"evaluation.reference={labelled}",
    ]  # fmt: skip

    def train(run: str, *overrides: str) -> tuple[int, str, list[dict[str, Any]]]:
        ((code, output, errors),) = run_ranks(command(shards, tmp_path / run, *given, *overrides), 1)
        metrics = tmp_path / run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return code, output + errors, [json.loads(line) for line in lines]

    code, text, records = train("lost", "schedules.lr.peak=0.3")
    step = len(records)
    start = records[-1]["reference/knn_20"] - records[-1]["drift/reference/knn_20"]
    assert code == 3 and 1 < step < 20 and records[-1]["reference/knn_20"] < 0.9 * start
    assert records[-2]["reference/knn_20"] >= 0.9 * start and 0 < records[-1]["drift/cka"] < 1
    last = text.strip().splitlines()[-1]
    assert f"stopped at step {step}, checkpoint saved: kNN of the reference is" in last
    assert "best checkpoint: " in last and "step-000000001 (knn_20" in last
    assert (tmp_path / "lost" / "checkpoints" / f"step-{step:09d}").is_dir()

    # a resumed run compares with its start, here without the weights and on an unlabelled reference
    code, text, records = train("kept", "schedules.lr.peak=0.0", "run.steps=1")
    assert code == 0 and "from the start to the last evaluation: kNN" in text
    unlabelled = ["evaluation.stop_if_below=null", f"evaluation.reference={plain}", "init.weights=null"]
    code, text, records = train("kept", "schedules.lr.peak=0.0", "run.steps=2", *unlabelled, "--accept", "schedules.lr")
    assert code == 0, text
    assert records[1]["drift/cka"] == pytest.approx(1.0) and records[1]["drift/knn_20"] == 0.0
    assert not any(tag.startswith(("reference/knn", "drift/reference/")) for tag in records[1])
    assert f"the evaluation images of {plain} or their preprocessing differ from those at the start, so" in text

    # so does a run that began with another run's checkpoint, which evaluation.stop_if_below allows
    begun = ["init.weights=null", "evaluation.reference=null"]
    code, text, records = train("next", "run.steps=3", *begun, "--resume", str(tmp_path / "kept"))
    assert code == 0 and "from the start to the last evaluation: kNN" in text
    start = json.loads((tmp_path / "next" / "baselines.json").read_text())
    assert (start["step"], start["is_trained"]) == (2, True) and records[0]["drift/distance"] > 0
    code, text, records = train("next", "run.steps=4", *begun)
    assert code == 0 and [record["step"] for record in records] == [3, 4] and records[1]["drift/distance"] > 0
    assert records[1]["eval/knn_20"] - records[1]["drift/knn_20"] == start["start"]["eval/knn_20"]

    code, text, _ = train("no", f"evaluation.reference={plain}")
    assert code == 2 and "evaluation.stop_if_below needs labels" in text.strip().splitlines()[-1]
    code, text, _ = train("no", "evaluation.reference=null", "evaluation.train=null")
    assert code == 2 and "evaluation.stop_if_below needs labelled images, and" in text.strip().splitlines()[-1]
    code, text, _ = train("no", "evaluation.every=30")
    assert code == 2 and "run has 20 steps; set it to at most 20" in text.strip().splitlines()[-1]
    code, text, _ = train("no", "init.weights=null")
    assert code == 2 and "evaluation.stop_if_below needs a starting network" in text.strip().splitlines()[-1]
