from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from joined_processes import run_on_ranks
from torch import Tensor

from streamtrain.config.monitor import CollapseConfig
from streamtrain.diagnostics.collapse import (
    ENTROPY,
    RANK,
    STD,
    USAGE,
    CollapseDetector,
    CollapseMetrics,
    measure_collapse,
)
from streamtrain.objective.prototypes import PlainWeight
from streamtrain.objective.sinkhorn import sinkhorn
from streamtrain.objective.targets import Targets, TeacherFeatures, TeacherPrototypes

IMAGES, DIM, PROTOTYPES, TEMPERATURE = 24, 16, 40, 0.1


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets_of(cls: Tensor, bottlenecks: Tensor, weight: Tensor, micro_batches: int) -> list[Targets]:
    """Return the targets of images ``[N, ...]`` in micro-batches of two equal views."""
    teacher_prototypes = TeacherPrototypes(PlainWeight(weight), None)
    pieces = zip(cls.chunk(micro_batches), bottlenecks.chunk(micro_batches), strict=True)
    features = [TeacherFeatures(b.repeat(2, 1), None, torch.zeros(0), c.repeat(2, 1)) for c, b in pieces]
    targets = []
    for each in features:
        assert each.global_features is not None
        assignment = sinkhorn(each.global_features, weight, TEMPERATURE, 3, PROTOTYPES)
        targets.append(Targets(each, teacher_prototypes, TEMPERATURE, assignment, None))
    return targets


def measure(targets: list[Targets], images: int = 256) -> CollapseMetrics:
    return measure_collapse(targets, 2, images, chunk_bytes=1)


def detector(start: int) -> CollapseDetector:
    return CollapseDetector(CollapseConfig(start=start))


def test_metrics_match_their_definitions() -> None:
    cls, bottlenecks, weight = drawn(IMAGES, DIM), drawn(IMAGES, 8, seed=1), 4 * drawn(PROTOTYPES, 8, seed=2)
    bottlenecks = torch.nn.functional.normalize(bottlenecks, dim=1)
    (target,) = targets = targets_of(cls, bottlenecks, weight, 1)
    metrics = measure(targets)
    values = metrics.values

    assert target.global_assignment is not None
    logits = bottlenecks @ weight.T / TEMPERATURE
    shares = (logits + target.global_assignment.column + target.global_assignment.row[:IMAGES, None]).exp()
    assert torch.allclose(shares.sum(1), torch.ones(IMAGES), atol=1e-5)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(1).mean()
    assert math.isclose(values[ENTROPY], float(entropy), rel_tol=1e-4)
    assert math.isclose(values[USAGE], len(set(logits.argmax(1).tolist())) / IMAGES, rel_tol=1e-6)
    rows = torch.nn.functional.normalize(cls, dim=1)
    singular = torch.linalg.svdvals(rows)
    singular = singular / singular.sum()
    assert math.isclose(values[RANK], float((-singular * singular.log()).sum().exp()), rel_tol=1e-4)
    assert math.isclose(values[STD], float(rows.std(0, correction=0).mean()) * DIM**0.5, rel_tol=1e-4)
    assert 0.8 < values[STD] < 1.0 < values[RANK] <= DIM
    assert math.isclose(metrics.shares[RANK], (values[RANK] - 1) / (DIM - 1), rel_tol=1e-6)

    # fewer images, several micro-batches
    half = measure(targets, IMAGES // 2).values
    parts = measure(targets_of(cls, bottlenecks, weight, 4), IMAGES // 2).values
    assert math.isclose(half[RANK], parts[RANK], rel_tol=1e-4) and half[USAGE] == parts[USAGE] and half != values
    assert measure(targets_of(cls[:8], bottlenecks[:8], weight, 1)).values[RANK] <= 8


def on_a_rank(rank: int, out: Path) -> None:
    cls, bottlenecks, weight = drawn(IMAGES, DIM), drawn(IMAGES, 8, seed=1), drawn(PROTOTYPES, 8, seed=2)
    part = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
    torch.save(measure(targets_of(cls[part], bottlenecks[part], weight, 2)).values, out / str(rank))


def test_all_ranks_get_the_metrics_of_all_images(tmp_path: Path) -> None:
    run_on_ranks(on_a_rank, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    alone = measure(targets_of(drawn(IMAGES, DIM), drawn(IMAGES, 8, seed=1), drawn(PROTOTYPES, 8), 1)).values
    assert first == second
    assert math.isclose(first[RANK], alone[RANK], rel_tol=1e-4) and math.isclose(first[STD], alone[STD], rel_tol=1e-4)


def test_without_prototypes_only_features_are_measured() -> None:
    rest = TeacherFeatures(None, None, torch.zeros(0), drawn(2 * IMAGES, DIM))
    metrics = measure([Targets(rest, TeacherPrototypes(None, None), TEMPERATURE, None, None)])
    assert metrics.values.keys() == metrics.shares.keys() == {RANK, STD}
    nothing = TeacherFeatures(None, None, torch.zeros(0))
    assert measure([Targets(nothing, TeacherPrototypes(None, None), TEMPERATURE, None, None)]).values == {}


SOUND = (drawn(IMAGES, DIM), drawn(IMAGES, 8, seed=1))
ALIKE = (drawn(1, DIM) + 1e-4 * SOUND[0], drawn(1, 8, seed=1) + 1e-4 * SOUND[1])
LINE = (drawn(IMAGES, 1) @ drawn(1, DIM), SOUND[1])


@pytest.mark.parametrize(
    ("images", "keys"),
    [(ALIKE, ["min_rank", "min_std", "min_usage", "max_entropy"]), (LINE, ["min_rank"]), (SOUND, [])],
)
def test_collapse_is_reported_once(images: tuple[Tensor, Tensor], keys: list[str]) -> None:
    weight, detect = 4 * drawn(PROTOTYPES, 8, seed=2), detector(start=100)
    sound, bad = (measure(targets_of(*each, weight, 1)) for each in (SOUND, images))
    warnings: list[str] = []
    for step in range(1, 40):
        warnings += detect.warnings(step, bad if 10 <= step < 20 or step >= 30 else sound)
        assert detect.num_out_of_bounds == (len(keys) if 12 <= step < 20 or step >= 32 else 0)
    for key in keys:
        lines = [line for line in warnings if f"monitor.collapse.{key})" in line]
        assert [line.partition(":")[0] for line in lines] == ["step 12", "step 32"], warnings
    assert len(warnings) == 2 * len(keys)


def test_before_the_start_only_tags_that_were_within_bounds_count() -> None:
    detect = detector(start=20)
    bad = measure(targets_of(*LINE, 4 * drawn(PROTOTYPES, 8, seed=2), 1))
    warnings = [line for step in range(1, 30) for line in detect.warnings(step, bad)]
    assert [line.partition(":")[0] for line in warnings] == ["step 22"]


def test_non_finite_features_count_neither_as_within_bounds_nor_as_collapse() -> None:
    detect = detector(start=1)
    metrics = measure(targets_of(drawn(IMAGES, DIM) * math.nan, SOUND[1], drawn(PROTOTYPES, 8), 1))
    assert math.isnan(metrics.values[RANK]) and math.isnan(metrics.values[STD])
    assert not [line for step in range(1, 6) for line in detect.warnings(step, metrics)]
