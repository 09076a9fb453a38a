from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from joined_processes import run_on_ranks
from torch import Tensor

from streamtrain.config.monitor import CollapseConfig
from streamtrain.diagnostics.collapse import ENTROPY, RANK, STD, USAGE, Collapse
from streamtrain.objective.prototypes import PlainWeight
from streamtrain.objective.sinkhorn import sinkhorn
from streamtrain.objective.targets import Targets, TeacherFeatures, TeacherPrototypes

IMAGES, DIM, PROTOTYPES, TEMPERATURE = 24, 16, 40, 0.1


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def targets_of(cls: Tensor, bottlenecks: Tensor, weight: Tensor, micro_batches: int) -> list[Targets]:
    """Of images ``[N, ...]`` in micro-batches of two equal views."""
    handle = TeacherPrototypes(PlainWeight(weight), None)
    pieces = zip(cls.chunk(micro_batches), bottlenecks.chunk(micro_batches), strict=True)
    features = [TeacherFeatures(b.repeat(2, 1), None, torch.zeros(0), c.repeat(2, 1)) for c, b in pieces]
    found = []
    for each in features:
        assert each.global_features is not None
        assignment = sinkhorn(each.global_features, weight, TEMPERATURE, 3, PROTOTYPES)
        found.append(Targets(each, handle, TEMPERATURE, assignment, None))
    return found


def collapse(**keys: object) -> Collapse:
    return Collapse(CollapseConfig.model_validate({"every": 1, **keys}), num_views=2, chunk_bytes=1)


def test_the_figures_are_those_of_the_definitions() -> None:
    cls, bottlenecks, weight = drawn(IMAGES, DIM), drawn(IMAGES, 8, seed=1), 4 * drawn(PROTOTYPES, 8, seed=2)
    bottlenecks = torch.nn.functional.normalize(bottlenecks, dim=1)
    (target,) = targets = targets_of(cls, bottlenecks, weight, 1)
    found = collapse().scalars(1, targets)

    assert target.global_assignment is not None
    logits = bottlenecks @ weight.T / TEMPERATURE
    shares = (logits + target.global_assignment.column + target.global_assignment.row[:IMAGES, None]).exp()
    assert torch.allclose(shares.sum(1), torch.ones(IMAGES), atol=1e-5)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(1).mean()
    assert math.isclose(found[ENTROPY], float(entropy), rel_tol=1e-4)
    assert math.isclose(found[USAGE], len(set(logits.argmax(1).tolist())) / IMAGES, rel_tol=1e-6)
    rows = torch.nn.functional.normalize(cls, dim=1)
    singular = torch.linalg.svdvals(rows)
    singular = singular / singular.sum()
    assert math.isclose(found[RANK], float((-singular * singular.log()).sum().exp()), rel_tol=1e-4)
    assert math.isclose(found[STD], float(rows.std(0, correction=0).mean()) * DIM**0.5, rel_tol=1e-4)
    assert 0.8 < found[STD] < 1.0 < found[RANK] <= DIM

    # some of the images, micro-batches, or another number of features
    half = collapse(images=IMAGES // 2).scalars(1, targets)
    parts = collapse(images=IMAGES // 2).scalars(1, targets_of(cls, bottlenecks, weight, 4))
    assert math.isclose(half[RANK], parts[RANK], rel_tol=1e-4) and half[USAGE] == parts[USAGE] and half != found
    assert collapse().scalars(1, targets_of(cls[:8], bottlenecks[:8], weight, 1))[RANK] <= 8


def on_a_rank(rank: int, out: Path) -> None:
    cls, bottlenecks, weight = drawn(IMAGES, DIM), drawn(IMAGES, 8, seed=1), drawn(PROTOTYPES, 8, seed=2)
    part = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
    found = collapse().scalars(1, targets_of(cls[part], bottlenecks[part], weight, 2))
    torch.save(found, out / str(rank))


def test_ranks_see_the_figures_of_all_images(tmp_path: Path) -> None:
    run_on_ranks(on_a_rank, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    alone = collapse().scalars(1, targets_of(drawn(IMAGES, DIM), drawn(IMAGES, 8, seed=1), drawn(PROTOTYPES, 8), 1))
    assert first == second
    assert math.isclose(first[RANK], alone[RANK], rel_tol=1e-4) and math.isclose(first[STD], alone[STD], rel_tol=1e-4)


def test_a_look_is_taken_at_the_first_step_and_every_so_many() -> None:
    targets = targets_of(drawn(IMAGES, DIM), drawn(IMAGES, 8), drawn(PROTOTYPES, 8), 1)
    assert [step for step in range(1, 9) if collapse(every=3).scalars(step, targets)] == [1, 3, 6]
    assert not any(collapse(every=0).scalars(step, targets) for step in range(1, 9))


SOUND = (drawn(IMAGES, DIM), drawn(IMAGES, 8, seed=1))
ALIKE = (drawn(1, DIM) + 1e-4 * SOUND[0], drawn(1, 8, seed=1) + 1e-4 * SOUND[1])
LINE = (drawn(IMAGES, 1) @ drawn(1, DIM), SOUND[1])


@pytest.mark.parametrize(
    ("images", "keys"),
    [(ALIKE, ["min_rank", "min_std", "min_usage", "max_entropy"]), (LINE, ["min_rank"]), (SOUND, [])],
)
def test_a_collapse_is_told_once(images: tuple[Tensor, Tensor], keys: list[str]) -> None:
    weight, watch = 4 * drawn(PROTOTYPES, 8, seed=2), collapse(start=100)
    sound, bad = (targets_of(*each, weight, 1) for each in (SOUND, images))
    told: list[str] = []
    for step in range(1, 40):
        watch.scalars(step, bad if 10 <= step < 20 or step >= 30 else sound)
        told += watch.warnings(step)
    for key in keys:
        lines = [line for line in told if f"monitor.collapse.{key})" in line]
        assert [line.partition(":")[0] for line in lines] == ["step 12", "step 32"], told
    assert len(told) == 2 * len(keys)


def test_before_the_start_only_what_was_sound_is_judged() -> None:
    weight, watch = 4 * drawn(PROTOTYPES, 8, seed=2), collapse(start=20)
    told = []
    for step in range(1, 30):
        watch.scalars(step, targets_of(*LINE, weight, 1))
        told += watch.warnings(step)
    assert [line.partition(":")[0] for line in told] == ["step 22"]


def test_what_is_not_finite_is_neither_sound_nor_a_collapse() -> None:
    watch = collapse(start=1)
    for step in range(1, 6):
        found = watch.scalars(step, targets_of(drawn(IMAGES, DIM) * math.nan, SOUND[1], drawn(PROTOTYPES, 8), 1))
        assert math.isnan(found[RANK]) and math.isnan(found[STD])
        assert not list(watch.warnings(step))
