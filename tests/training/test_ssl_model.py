"""One packed step against a plain reference in float64: a loop over views, whole logits, textbook formulas."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import for_each_dtype, record_kernel_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_processes import run_on_ranks
from plain_step import plain_losses

from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, Masks
from streamtrain.model.initialise import initialise
from streamtrain.objective.anchor import AnchorTargets
from streamtrain.objective.gram import GramTargets
from streamtrain.objective.prototypes import PlainWeight
from streamtrain.objective.targets import TargetMaker, Targets, TeacherPrototypes
from streamtrain.ops.collectives import sum_over_ranks
from streamtrain.ops.cpu import build as cpu_build
from streamtrain.training.ssl_model import RECIPE_WEIGHTS, FrozenBackbone, LossWeights, SSLModel

B, V, L, PATCH = 3, 2, 3, 4
# global crops are rectangles of 16 patches
GLOBAL, LOCAL, GRID = (8, 32), (8, 8), (2, 8)
TEMPERATURE = 0.07


def config_of(objective: dict[str, Any] | None = None, **model: Any) -> Config:
    head = {"prototypes": 130, "hidden": 24, "bottleneck": 12}
    backbone = {"patch_size": PATCH, "dim": 24, "depth": 2, "num_heads": 2, "num_registers": 2, "layerscale": 0.5}
    return build(
        {
            "crops": {"global_size": GLOBAL, "local_size": LOCAL, "global_count": V, "local_count": L},
            "model": {**backbone, "drop_path": 0.0, **model},
            "objective": {
                "chunk_bytes": 2**16,
                "global_loss": {"head": head},
                "patch_loss": {"head": head, **(objective or {}).pop("patch_loss", {})},
                **(objective or {}),
            },
        }
    )


def ssl_model_of(config: Config, seed: int) -> SSLModel:
    """Return a model with weights large enough that no loss is near its value at a symmetric start."""
    model = SSLModel(config)
    initialise(model, config.model, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(seed: int, masked: bool = True, size: int = B, identical: bool = False) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    pixels = [
        torch.randint(0, 256, (count * size, *shape, 3), dtype=torch.uint8, generator=draw)
        for count, shape in ((V, GLOBAL), (L, LOCAL))
    ]
    if identical:
        pixels = [crops[:1].expand_as(crops).contiguous() for crops in pixels]
    grid_mask = torch.rand(V * size, 16, generator=draw) < 0.4
    # a crop without a mask still counts in the mean over crops
    grid_mask[1] = False
    grid_mask &= masked
    index = grid_mask.flatten().nonzero()[:, 0]
    weight = (1 / grid_mask.sum(1).clamp_min(1).float())[:, None].expand_as(grid_mask)[grid_mask]
    padding = 60 - len(index)
    masks = Masks(grid_mask, F.pad(index, (0, padding)), F.pad(weight, (0, padding)))
    return Batch(seed * 100 + np.arange(size), pixels[0], pixels[1], masks)


def handles_of(teacher: SSLModel) -> TeacherPrototypes:
    patch_head = teacher.patch_head
    return TeacherPrototypes(
        PlainWeight(teacher.global_head.prototypes.weight),
        None if patch_head is None else PlainWeight(patch_head.prototypes.weight),
    )


def targets_of(
    config: Config, teacher: SSLModel, batches: list[Batch], weights: LossWeights = RECIPE_WEIGHTS
) -> list[Targets]:
    features = [teacher.teacher_features(batch, weights) for batch in batches]
    return TargetMaker(config.objective).make(features, handles_of(teacher), TEMPERATURE)


def with_frozen_targets(config: Config, teacher: SSLModel, batch: Batch, targets: Targets) -> Targets:
    """Return ``targets`` with the teacher as Gram teacher and as anchor."""
    start = FrozenBackbone(config).to(next(teacher.parameters()).dtype)
    start.load_state_dict({key: value for key, value in teacher.state_dict().items() if key.startswith("backbone.")})
    features = start(batch.global_crops, GRID)
    with_gram = config.objective.anchor.patches == "gram"
    return replace(
        targets,
        gram=GramTargets(features.patches, "image", "keep", "all", chunk_bytes=2**16),
        anchor=AnchorTargets(features.cls, features.patches, with_gram, chunk_bytes=2**16),
    )


OBJECTIVES: dict[str, dict[str, Any]] = {
    "sinkhorn-ibot": {},
    "softmax-ibot": {"centering": "softmax", "anchor": {"patches": "cosine"}},
    "l2-sum": {"patch_loss": {"kind": "l2", "reduction": "sum"}},
    "l2-mean": {"patch_loss": {"kind": "l2"}},
    "cosine-sum": {"patch_loss": {"kind": "cosine", "reduction": "sum"}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_step_equals_the_reference(name: str) -> None:
    check_step(0, 1, name)


def test_packed_step_over_two_ranks_equals_the_reference(tmp_path: Path) -> None:
    run_on_ranks(check_steps, tmp_path)


def check_steps(rank: int) -> None:
    for name in OBJECTIVES:
        check_step(rank, 2, name)


def check_step(rank: int, ranks: int, name: str) -> None:
    """Compare each loss and the gradient of a step of two micro-batches over the ranks with float64."""
    config = config_of(dict(OBJECTIVES[name]))
    student, teacher = ssl_model_of(config, 0), ssl_model_of(config, 1)
    batches = [batch_of(0), batch_of(1)]
    weights = LossWeights(0.7, 1.3, 0.2, gram=2.0, anchor=1.5)
    exact = deepcopy(student).double()
    expected = plain_losses(config, exact, deepcopy(teacher).double(), batches, TEMPERATURE)
    factors = {"global": 0.7, "patch": 1.3, "koleo": 0.2, "gram": 2.0, "anchor": 1.5}
    total = torch.stack([factors[term] * loss for losses in expected for term, loss in losses.items()]).sum()
    wanted = torch.autograd.grad(total, tuple(exact.parameters()))

    mine = batches[rank::ranks]
    for batch, targets, losses in zip(mine, targets_of(config, teacher, mine), expected[rank::ranks], strict=True):
        got = student.student_losses(batch, with_frozen_targets(config, teacher, batch, targets), weights)
        assert got.keys() == {"total", *losses}
        for term, loss in losses.items():
            torch.testing.assert_close(got[term].double(), loss.detach(), rtol=1e-5, atol=1e-6)
            assert not got[term].requires_grad
        got["total"].backward()
    for (parameter_name, parameter), gradient in zip(student.named_parameters(), wanted, strict=True):
        assert parameter.grad is not None, parameter_name
        sum_over_ranks(parameter.grad)
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm(), parameter_name


def test_targets_do_not_depend_on_the_micro_batch() -> None:
    config = config_of()
    teacher = ssl_model_of(config, 1)
    batches = [batch_of(0), batch_of(1)]
    together = targets_of(config, teacher, batches)
    alone = targets_of(config, teacher, batches[:1])
    first, second = (targets[0].global_assignment for targets in (together, alone))
    assert first is not None and second is not None
    assert together[1].global_assignment is not None
    assert torch.equal(first.column, together[1].global_assignment.column)
    assert not torch.allclose(first.column, second.column)


def test_a_loss_term_of_weight_zero_calls_no_head() -> None:
    config = config_of()
    student, teacher = ssl_model_of(config, 0), ssl_model_of(config, 1)
    called: list[str] = []
    for owner, model in (("student", student), ("teacher", teacher)):
        for head in ("global_head", "patch_head"):
            module = getattr(model, head).projection
            module.register_forward_hook(lambda *_, name=f"{owner}.{head}": called.append(name))
    batch = batch_of(0)
    for weights, expected in (
        (LossWeights(1.0, 0.0, 0.0), ["teacher.global_head", "student.global_head"]),
        (LossWeights(0.0, 1.0, 0.0), ["teacher.patch_head", "student.patch_head"]),
        (
            LossWeights(1.0, 1.0, 0.0),
            ["teacher.global_head", "teacher.patch_head"] + ["student.global_head", "student.patch_head"],
        ),
    ):
        called.clear()
        (targets,) = targets_of(config, teacher, [batch], weights)
        losses = student.student_losses(batch, targets, weights)
        assert called == expected
        assert "koleo" not in losses and len(losses) == 1 + len(expected) // 2


def test_the_teacher_is_skipped_if_no_loss_needs_it() -> None:
    config = config_of()
    student, teacher = ssl_model_of(config, 0), ssl_model_of(config, 1)
    teacher.backbone.embedding.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    weights = LossWeights(0.0, 0.0, 1.0)
    losses = student.student_losses(batch_of(0), targets_of(config, teacher, [batch_of(0)], weights)[0], weights)
    assert losses.keys() == {"total", "koleo"}


def test_a_batch_without_any_mask_has_no_patch_loss() -> None:
    config = config_of()
    student, teacher = ssl_model_of(config, 0), ssl_model_of(config, 1)
    batch = batch_of(0, masked=False)
    losses = student.student_losses(batch, targets_of(config, teacher, [batch])[0])
    losses["total"].backward()
    assert losses["patch"] == 0.0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_teacher_features_in_chunks_equal_the_whole() -> None:
    config = config_of()
    chunked = config.model_copy(update={"teacher": config.teacher.model_copy(update={"chunk": 2})})
    batch = batch_of(0)
    whole, pieces = (ssl_model_of(c, 1).teacher_features(batch) for c in (config, chunked))
    torch.testing.assert_close(pieces.global_features, whole.global_features)
    torch.testing.assert_close(pieces.patch_features, whole.patch_features)
    assert not whole.global_features.requires_grad


def test_a_step_repeats_bit_for_bit_and_another_slot_differs() -> None:
    config = config_of(drop_path=0.4, rope_rescale=2.0)
    student, teacher = ssl_model_of(config, 0), ssl_model_of(config, 1)
    batch = batch_of(0)
    (targets,) = targets_of(config, teacher, [batch])
    elsewhere = Batch(batch.slots + B, batch.global_crops, batch.local_crops, batch.masks)
    first, again, other = (student.student_losses(b, targets)["total"].detach() for b in (batch, batch, elsewhere))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 3),
    masked=st.booleans(),
    identical=st.booleans(),
    scale=st.sampled_from([1.0, 100.0]),
    name=st.sampled_from(sorted(OBJECTIVES)),
    untied=st.sampled_from(["none", "cls", "local_cls", "cls_and_local_cls"]),
    seed=st.integers(0, 1000),
)
def test_odd_batches_and_large_logits(
    size: int, masked: bool, identical: bool, scale: float, name: str, untied: str, seed: int
) -> None:
    """Losses agree with the formulas where these have a value, and are finite, also in bf16."""
    config = config_of(deepcopy(OBJECTIVES[name]), untied_norms=untied)
    student, teacher = ssl_model_of(config, seed), ssl_model_of(config, seed + 1)
    batch = batch_of(seed, masked, size, identical)
    for model in (student, teacher):
        for head in (model.global_head, model.patch_head):
            if head is not None:
                largest = head.prototypes.weight.norm(dim=1).max()
                head.prototypes.weight.data *= scale / largest.detach()
    exact = [deepcopy(model).double() for model in (student, teacher)]
    (expected,) = plain_losses(config, *exact, [batch], TEMPERATURE)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = deepcopy(student).to(dtype), deepcopy(teacher).to(dtype)
        (targets,) = targets_of(config, theirs, [batch])
        targets = with_frozen_targets(config, theirs, batch, targets)
        losses = ours.student_losses(batch, targets, LossWeights(gram=1.0, anchor=1.0))
        losses["total"].backward()
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
        for term, loss in expected.items():
            if dtype == torch.float32 and not (term == "koleo" and identical):
                torch.testing.assert_close(losses[term].double(), loss.detach(), rtol=1e-4 * scale, atol=1e-5)


def test_centres_move_once_a_step_and_are_restored() -> None:
    config = config_of({"centering": "softmax"})
    teacher = ssl_model_of(config, 1)
    maker = TargetMaker(config.objective)
    batches = [batch_of(0), batch_of(1)]
    first, second = ([teacher.teacher_features(batch) for batch in some] for some in (batches, batches[1:]))
    maker.make(first, handles_of(teacher), TEMPERATURE)
    means = [
        (torch.cat([each.global_features for each in step]) @ teacher.global_head.prototypes.weight.T).mean(0).detach()
        for step in (first, second)
    ]
    torch.testing.assert_close(maker.state_dict()["global_head"], means[0])
    maker.make(second, handles_of(teacher), TEMPERATURE)
    state = maker.state_dict()
    torch.testing.assert_close(state["global_head"], 0.9 * means[0] + 0.1 * means[1])
    maker.revert()
    torch.testing.assert_close(maker.state_dict()["global_head"], means[0])
    maker.load_state_dict(state)
    other = TargetMaker(config.objective)
    other.load_state_dict(state)
    features = [teacher.teacher_features(batches[0])]
    pair = [m.make(features, handles_of(teacher), TEMPERATURE)[0].patch_assignment for m in (maker, other)]
    assert pair[0] is not None and pair[1] is not None and torch.equal(pair[0].row, pair[1].row)


def test_the_gram_term_adds_to_the_others_and_changes_none_of_them() -> None:
    config = config_of()
    student, teacher = ssl_model_of(config, 0), ssl_model_of(config, 1)
    batch = batch_of(0)
    weights = LossWeights(gram=2.0)
    (targets,) = targets_of(config, teacher, [batch], weights)
    wanted = torch.randn(V * B, 16, config.model.dim, generator=torch.Generator().manual_seed(0))
    targets = replace(targets, gram=GramTargets(wanted, "image", "keep", "all", chunk_bytes=2**16))
    losses = student.student_losses(batch, targets, weights)
    without = student.student_losses(batch, targets, replace(weights, gram=0.0))
    for name in ("global", "patch", "koleo"):
        torch.testing.assert_close(without[name], losses[name])
    torch.testing.assert_close(losses["total"], without["total"] + 2.0 * losses["gram"])


def test_gram_features_of_larger_crops_are_resized_to_the_student_grid() -> None:
    config = config_of()
    gram_teacher = FrozenBackbone(config)
    initialise(gram_teacher, config.model, 0)
    crops = torch.randint(0, 256, (2, 16, 64, 3), dtype=torch.uint8)
    assert gram_teacher(crops, GRID).patches.shape == (2, 16, config.model.dim)


@pytest.mark.parametrize("patches", ["gram", "cosine", "none"])
def test_the_anchor_loss_is_zero_without_masks_at_the_start(patches: str) -> None:
    config = config_of({"anchor": {"weight": 1.0, "patches": patches}})
    student, batch = ssl_model_of(config, 0), batch_of(0, masked=False)
    weights = LossWeights(koleo=0.0, anchor=1.0)
    (targets,) = targets_of(config, student, [batch], weights)
    targets = with_frozen_targets(config, student, batch, targets)
    assert targets.anchor is not None
    if patches == "none":
        targets = replace(targets, anchor=replace(targets.anchor, patches=None))
    alone = LossWeights(0.0, 0.0, 0.0, anchor=1.0)
    losses = student.student_losses(batch, targets, alone)
    losses["total"].backward()
    assert losses.keys() == {"total", "anchor"} and losses["anchor"].abs() < 1e-6
    assert max(float(p.grad.abs().max()) for p in student.backbone.parameters() if p.grad is not None) < 1e-5
    # the student's masked crops are compared with the unmasked start
    assert student.student_losses(batch_of(0), targets, alone)["anchor"] > 1e-3


def test_local_weight_scales_the_local_pairs_and_skips_local_crops_at_zero() -> None:
    config = config_of()
    student, teacher = ssl_model_of(config, 0), ssl_model_of(config, 1)
    batch = batch_of(0)
    (targets,) = targets_of(config, teacher, [batch])
    full, half, none = (
        student.student_losses(batch, targets, LossWeights(local_loss=x))["global"] for x in (1.0, 0.5, 0.0)
    )
    torch.testing.assert_close(half, (full + none) / 2)
    assert none < half
    empty = replace(batch, local_crops=torch.zeros(0, 8, 8, 3, dtype=torch.uint8))
    torch.testing.assert_close(student.student_losses(empty, targets, LossWeights(local_loss=0.0))["global"], none)


def test_koleo_takes_its_neighbours_and_groups_from_the_configuration() -> None:
    batch, weights = batch_of(1), LossWeights(global_loss=0.0, patch_loss=0.0, koleo=1.0)
    found = {}
    for name, keys in {
        "nearest": {},
        "two": {"neighbours": 2},
        "all_ranks": {"distributed": True},
        "groups": {"distributed": True, "group_size": 1},
    }.items():
        config = config_of({"koleo": keys})
        model = ssl_model_of(config, 1)
        (targets,) = targets_of(config, model, [batch], weights)
        found[name] = float(model.student_losses(batch, targets, weights)["total"].detach())
    assert found["nearest"] == found["all_ranks"] and found["two"] < found["nearest"]
    # groups of one sample have no neighbours
    assert found["groups"] == 0.0


@for_each_dtype
@pytest.mark.parametrize("kernels", [True, False])
def test_students_and_teachers_use_the_kernels_if_enabled(
    kernels: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(dim=64)
    monkeypatch.setattr(cpu_build._Selection, "enabled", kernels)
    model, gram = ssl_model_of(config, 0).to(dtype), FrozenBackbone(config).to(dtype)
    gram.backbone.load_state_dict(model.backbone.state_dict())
    exact = ssl_model_of(config, 0).double().features(batch_of(0).global_crops).patches
    called = record_kernel_calls(monkeypatch.setattr)
    with torch.no_grad():
        for found in (model.features(batch_of(0).global_crops).patches, gram(batch_of(0).global_crops, GRID).patches):
            assert (found.float() - exact).norm() < 0.05 * exact.norm()
    # two blocks of two branches in each network
    assert len(called) == (8 if kernels else 0)
