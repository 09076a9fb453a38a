"""One packed step against a plain reference: a loop over views, whole logits, textbook formulas."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, Masks
from streamtrain.learner import RECIPE_WEIGHTS, GramTeacher, Learner, LossWeights
from streamtrain.model.initialise import initialise
from streamtrain.objective.gram import GramTargets
from streamtrain.objective.prototypes import PlainWeight
from streamtrain.objective.targets import PrototypeHandles, TargetMaker, Targets

B, V, L, PATCH = 3, 2, 3, 4
TEMPERATURE, STUDENT_TEMPERATURE = 0.07, 0.1


def config_of(objective: dict[str, Any] | None = None, **model: Any) -> Config:
    head = {"prototypes": 130, "hidden": 24, "bottleneck": 12}
    backbone = {"patch_size": PATCH, "dim": 24, "depth": 2, "num_heads": 2, "num_registers": 2, "layerscale": 0.5}
    return build(
        {
            "crops": {"global_size": 16, "local_size": 8, "global_count": V, "local_count": L},
            "model": {**backbone, "drop_path": 0.0, **model},
            "objective": {
                "chunk_bytes": 2**16,
                "global_loss": {"head": head},
                "patch_loss": {"head": head, **(objective or {}).pop("patch_loss", {})},
                **(objective or {}),
            },
        }
    )


def learner_of(config: Config, seed: int) -> Learner:
    """Weights large enough that no term is near its value at a symmetric start."""
    learner = Learner(config)
    initialise(learner, config.model, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in learner.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return learner


def batch_of(seed: int, masked: bool = True) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    pixels = [
        torch.randint(0, 256, (count * B, size, size, 3), dtype=torch.uint8, generator=draw)
        for count, size in ((V, 16), (L, 8))
    ]
    grid_mask = torch.rand(V * B, 16, generator=draw) < 0.4
    # a crop without a mask counts in the mean over crops all the same
    grid_mask[1] = False
    grid_mask &= masked
    index = grid_mask.flatten().nonzero()[:, 0]
    weight = (1 / grid_mask.sum(1).clamp_min(1).float())[:, None].expand_as(grid_mask)[grid_mask]
    padding = 60 - len(index)
    masks = Masks(grid_mask, F.pad(index, (0, padding)), F.pad(weight, (0, padding)))
    return Batch(seed * 100 + np.arange(B), pixels[0], pixels[1], masks)


def handles_of(teacher: Learner) -> PrototypeHandles:
    patch_head = teacher.patch_head
    return PrototypeHandles(
        PlainWeight(teacher.global_head.prototypes.weight),
        None if patch_head is None else PlainWeight(patch_head.prototypes.weight),
    )


def targets_of(
    config: Config, teacher: Learner, batches: list[Batch], weights: LossWeights = RECIPE_WEIGHTS
) -> list[Targets]:
    features = [teacher(batch, weights=weights) for batch in batches]
    return TargetMaker(config.objective).make(features, handles_of(teacher), TEMPERATURE)


class PlainBackbone(nn.Module):
    """The backbone of one crop size, from the textbook: a convolution, [N, T, D] tokens, softmax attention."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.net = learner.backbone
        self.config = learner.config.model

    def forward(self, pixels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        embedding, dim = self.net.embedding, self.config.dim
        kernel = embedding.projection.weight.reshape(dim, 3, PATCH, PATCH)
        grid = F.conv2d(pixels, kernel, embedding.projection.bias, stride=PATCH)
        height, width = grid.shape[-2:]
        tokens = grid.flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[..., None], embedding.mask_token, tokens)
        prefix = torch.cat([embedding.cls_token, embedding.register_tokens]).expand(len(pixels), -1, -1)
        tokens = torch.cat([prefix, tokens], dim=1)
        for block in self.net.blocks:
            tokens = tokens + block.scale1.gamma * self._attention(block, block.norm1(tokens), height, width)
            hidden = F.gelu(block.mlp.up(block.norm2(tokens)))
            tokens = tokens + block.scale2.gamma * block.mlp.down(hidden)
        tokens = self.net.norm(tokens)
        return tokens[:, 0], tokens[:, 1 + self.config.num_registers :]

    def _attention(self, block: Any, tokens: Tensor, height: int, width: int) -> Tensor:
        dim, heads = self.config.dim, self.config.num_heads
        query_bias, value_bias = block.attention.qkv.bias.chunk(2)
        query, key, value = (
            (tokens @ weight.T + bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for weight, bias in zip(
                block.attention.qkv.weight.split(dim), (query_bias, 0.0 * query_bias, value_bias), strict=True
            )
        )
        query, key = (self._rotate(x, height, width) for x in (query, key))
        scores = query @ key.transpose(2, 3) / math.sqrt(dim // heads)
        return block.attention.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    def _rotate(self, x: Tensor, height: int, width: int) -> Tensor:
        """Pairs (i, i + half) of each patch turn by 2π · coordinate / period, rows first, then columns."""
        prefix, half = 1 + self.config.num_registers, x.shape[-1] // 2
        result = [x[:, :, :prefix]]
        for patch, (row, column) in enumerate(product(range(height), range(width))):
            y, x_ = 2 * (row + 0.5) / height - 1, 2 * (column + 0.5) / width - 1
            angles = []
            for coordinate in (y, x_):
                angles += [2 * math.pi * coordinate / 100.0 ** (2 * i / half) for i in range(half // 2)]
            cosine, sine = torch.tensor(angles).cos(), torch.tensor(angles).sin()
            one, two = x[:, :, prefix + patch].split(half, dim=-1)
            result.append(torch.cat([one * cosine - two * sine, two * cosine + one * sine], dim=-1)[:, :, None])
        return torch.cat(result, dim=2)


def project(head: Any, features: Tensor) -> Tensor:
    for index, layer in enumerate(head.projection.layers):
        features = features if index == 0 else F.gelu(features)
        features = features @ layer.weight.T + layer.bias
    return features / features.norm(dim=-1, keepdim=True)


def plain_sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    q = (logits / TEMPERATURE).double().exp()
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return (q * q.shape[0]).float()


def plain_softmax(logits: Tensor) -> Tensor:
    # of the first step, whose centre is 0
    return (logits / TEMPERATURE).softmax(1)


def pixels_of(crops: Tensor, config: Config) -> Tensor:
    mean, std = torch.tensor(config.crops.mean), torch.tensor(config.crops.std)
    return ((crops / 255 - mean) / std).permute(0, 3, 1, 2)


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * (logits / STUDENT_TEMPERATURE).log_softmax(-1)).sum(-1)


def plain_losses(config: Config, student: Learner, teacher: Learner, batches: list[Batch]) -> list[dict[str, Tensor]]:
    """Losses of every micro-batch of one step, a forward per view."""
    assign = plain_sinkhorn if config.objective.centering == "sinkhorn" else plain_softmax
    kind, reduction = config.objective.patch_loss.kind, config.objective.patch_loss.reduction
    views = [
        [pixels_of(crops, config).unflatten(0, (count, B)) for crops, count in zip(pair, (V, L), strict=True)]
        for pair in ((batch.global_crops, batch.local_crops) for batch in batches)
    ]
    masks = [batch.masks.grid_mask.unflatten(0, (V, B)) for batch in batches]
    with torch.no_grad():
        seen = [[PlainBackbone(teacher)(view, None) for view in of_global] for of_global, _ in views]
        cls_logits = torch.stack(
            [
                torch.stack(
                    [project(teacher.global_head, cls) @ teacher.global_head.prototypes.weight.T for cls, _ in s]
                )
                for s in seen
            ]
        )
        cls_targets = assign(cls_logits.flatten(0, 2)).unflatten(0, cls_logits.shape[:3])
        patches = [patch[mask] for s, m in zip(seen, masks, strict=True) for (_, patch), mask in zip(s, m, strict=True)]
        if kind == "ibot":
            head = teacher.patch_head
            assert head is not None
            logits = project(head, torch.cat(patches)) @ head.prototypes.weight.T
            patches = list(assign(logits).split([len(piece) for piece in patches]))
    patch_targets = [patches[i : i + V] for i in range(0, len(patches), V)]

    results = []
    for (of_global, of_local), mask, cls_target, patch_target in zip(
        views, masks, cls_targets, patch_targets, strict=True
    ):
        backbone = PlainBackbone(student)
        outputs = [backbone(view, m) for view, m in zip(of_global, mask, strict=True)]
        outputs += [backbone(view, None) for view in of_local]
        pairs = [
            cross_entropy(cls_target[t], project(student.global_head, cls) @ student.global_head.prototypes.weight.T)
            for s, (cls, _) in enumerate(outputs)
            for t in range(V)
            if s != t
        ]
        assert len(pairs) == V * (V - 1) + V * L
        per_crop = []
        for v, b in product(range(V), range(B)):
            wanted = patch_target[v].split(mask[v].sum(1).tolist())[b]
            given = outputs[v][1][b][mask[v][b]]
            if not len(given):
                continue
            if kind == "ibot":
                head = student.patch_head
                assert head is not None
                losses = cross_entropy(wanted, project(head, given) @ head.prototypes.weight.T)
            elif kind == "l2":
                losses = (given - wanted).square().sum(1)
            else:
                losses = 1 - (given * wanted).sum(1) / given.norm(dim=1) / wanted.norm(dim=1)
            per_crop.append(losses.sum() if reduction == "sum" and kind != "ibot" else losses.mean())
        koleo = []
        for cls, _ in outputs[:V]:
            unit = cls / cls.norm(dim=1, keepdim=True)
            nearest = [min((unit[i] - unit[j]).norm() for j in range(B) if j != i) for i in range(B)]
            koleo.append(-torch.stack(nearest).log().mean())
        results.append(
            {
                "global": torch.stack(pairs).mean(),
                "patch": torch.stack(per_crop).sum() / (V * B),
                "koleo": torch.stack(koleo).sum(),
            }
        )
    return results


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"centering": "softmax"},
        {"patch_loss": {"kind": "l2", "reduction": "sum"}},
        {"patch_loss": {"kind": "l2"}},
        {"patch_loss": {"kind": "cosine", "reduction": "sum"}},
    ],
    ids=["sinkhorn-ibot", "softmax-ibot", "l2-sum", "l2-mean", "cosine-sum"],
)
def test_packed_step_equals_the_plain_one(objective: dict[str, Any]) -> None:
    config = config_of(dict(objective))
    student, teacher = learner_of(config, 0), learner_of(config, 1)
    batches = [batch_of(0), batch_of(1)]
    weights = LossWeights(0.7, 1.3, 0.2)
    expected = plain_losses(config, student, teacher, batches)
    total = sum(0.7 * loss["global"] + 1.3 * loss["patch"] + 0.2 * loss["koleo"] for loss in expected)
    names, parameters = zip(*student.named_parameters(), strict=True)
    wanted = torch.autograd.grad(total, parameters)

    for batch, targets, losses in zip(batches, targets_of(config, teacher, batches), expected, strict=True):
        got = student(batch, targets, weights)
        for name, loss in losses.items():
            torch.testing.assert_close(got[name], loss.detach(), rtol=1e-5, atol=1e-6)
            assert not got[name].requires_grad
        got["total"].backward()
    for name, parameter, gradient in zip(names, parameters, wanted, strict=True):
        assert parameter.grad is not None, name
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_targets_do_not_depend_on_the_micro_batch() -> None:
    config = config_of()
    teacher = learner_of(config, 1)
    batches = [batch_of(0), batch_of(1)]
    together = targets_of(config, teacher, batches)
    alone = targets_of(config, teacher, batches[:1])
    first, second = (targets[0].global_assignment for targets in (together, alone))
    assert first is not None and second is not None
    assert together[1].global_assignment is not None
    assert torch.equal(first.column, together[1].global_assignment.column)
    assert not torch.allclose(first.column, second.column)


def test_a_term_of_weight_zero_calls_no_head() -> None:
    config = config_of()
    student, teacher = learner_of(config, 0), learner_of(config, 1)
    called: list[str] = []
    for owner, learner in (("student", student), ("teacher", teacher)):
        for head in ("global_head", "patch_head"):
            module = getattr(learner, head).projection
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
        losses = student(batch, targets, weights)
        assert called == expected
        assert "koleo" not in losses and len(losses) == 1 + len(expected) // 2


def test_the_teacher_rests_where_nothing_asks_for_it() -> None:
    config = config_of()
    student, teacher = learner_of(config, 0), learner_of(config, 1)
    teacher.backbone.embedding.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    weights = LossWeights(0.0, 0.0, 1.0)
    losses = student(batch_of(0), targets_of(config, teacher, [batch_of(0)], weights)[0], weights)
    assert losses.keys() == {"total", "koleo"}


def test_a_batch_without_any_mask_has_no_patch_loss() -> None:
    config = config_of()
    student, teacher = learner_of(config, 0), learner_of(config, 1)
    batch = batch_of(0, masked=False)
    losses = student(batch, targets_of(config, teacher, [batch])[0])
    losses["total"].backward()
    assert losses["patch"] == 0.0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_teacher_features_in_chunks_equal_the_whole() -> None:
    config = config_of()
    chunked = config.model_copy(update={"teacher": config.teacher.model_copy(update={"chunk": 2})})
    batch = batch_of(0)
    whole, pieces = (learner_of(c, 1)(batch) for c in (config, chunked))
    torch.testing.assert_close(pieces.global_features, whole.global_features)
    torch.testing.assert_close(pieces.patch_features, whole.patch_features)
    assert not whole.global_features.requires_grad


def test_a_step_repeats_bit_for_bit_and_another_slot_differs() -> None:
    config = config_of(drop_path=0.4, rope_rescale=2.0)
    student, teacher = learner_of(config, 0), learner_of(config, 1)
    batch = batch_of(0)
    (targets,) = targets_of(config, teacher, [batch])
    elsewhere = Batch(batch.slots + B, batch.global_crops, batch.local_crops, batch.masks)
    first, again, other = (student(b, targets)["total"].detach() for b in (batch, batch, elsewhere))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("untied", ["none", "local_cls"])
def test_everything_is_finite_in_bf16_at_batch_one(untied: str) -> None:
    config = config_of(drop_path=0.4, rope_rescale=2.0, untied_norms=untied)
    student, teacher = learner_of(config, 0).bfloat16(), learner_of(config, 1).bfloat16()
    whole = batch_of(0)
    rows = torch.arange(V) * B
    mask = whole.masks.grid_mask[rows]
    index = mask.flatten().nonzero()[:, 0]
    masks = Masks(mask, index, torch.full((len(index),), 0.1))
    batch = Batch(whole.slots[:1], whole.global_crops[rows], whole.local_crops[torch.arange(L) * B], masks)
    losses = student(batch, targets_of(config, teacher, [batch])[0])
    losses["total"].backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_centres_move_once_a_step_and_are_restored() -> None:
    config = config_of({"centering": "softmax"})
    teacher = learner_of(config, 1)
    maker = TargetMaker(config.objective)
    batches = [batch_of(0), batch_of(1)]
    maker.make([teacher(batch) for batch in batches], handles_of(teacher), TEMPERATURE)
    rows = torch.cat([teacher(batch).global_features for batch in batches])
    expected = 0.1 * (rows @ teacher.global_head.prototypes.weight.T).mean(0)
    state = maker.state_dict()
    torch.testing.assert_close(state["global_head"], expected.detach())
    other = TargetMaker(config.objective)
    other.load_state_dict(state)
    features = [teacher(batches[0])]
    pair = [m.make(features, handles_of(teacher), TEMPERATURE)[0].patch_assignment for m in (maker, other)]
    assert pair[0] is not None and pair[1] is not None and torch.equal(pair[0].row, pair[1].row)


def test_gram_term_sees_all_patches_of_the_masked_student() -> None:
    config = config_of()
    student, teacher = learner_of(config, 0), learner_of(config, 1)
    batch = batch_of(0)
    gram_teacher = GramTeacher(config)
    gram_teacher.load_state_dict({k: v for k, v in teacher.state_dict().items() if k.startswith("backbone.")})
    wanted = gram_teacher(batch.global_crops, (4, 4))
    weights = LossWeights(1.0, 1.0, 0.1, gram=2.0)
    (targets,) = targets_of(config, teacher, [batch], weights)
    targets = replace(targets, gram=GramTargets(wanted, "image", "keep", "all", chunk_bytes=2**16))
    losses = student(batch, targets, weights)

    pictures = pixels_of(batch.global_crops, config)
    ours = PlainBackbone(student)(pictures, batch.masks.grid_mask)[1]
    theirs = PlainBackbone(teacher)(pictures, None)[1]
    ours, theirs = (x / x.norm(dim=-1, keepdim=True) for x in (ours, theirs))
    expected = (ours @ ours.transpose(1, 2) - theirs @ theirs.transpose(1, 2)).square().mean()
    torch.testing.assert_close(losses["gram"], expected.detach())
    without = student(batch, targets, replace(weights, gram=0.0))
    for name in ("global", "patch", "koleo"):
        torch.testing.assert_close(without[name], losses[name])
    torch.testing.assert_close(losses["total"], without["total"] + 2.0 * losses["gram"])


def test_a_gram_teacher_of_larger_crops_keeps_to_the_grid_of_the_student() -> None:
    config = config_of()
    gram_teacher = GramTeacher(config)
    initialise(gram_teacher, config.model, 0)
    crops = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    assert gram_teacher(crops, (4, 4)).shape == (2, 16, config.model.dim)


def test_local_weight_scales_the_local_pairs_and_spares_their_crops_at_zero() -> None:
    config = config_of()
    student, teacher = learner_of(config, 0), learner_of(config, 1)
    batch = batch_of(0)
    (targets,) = targets_of(config, teacher, [batch])
    full, half, none = (student(batch, targets, LossWeights(local_loss=x))["global"] for x in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half, (full + none) / 2)
    assert none < half
    empty = replace(batch, local_crops=torch.zeros(0, 8, 8, 3, dtype=torch.uint8))
    torch.testing.assert_close(student(empty, targets, LossWeights(local_loss=0.0))["global"], none)


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
        learner = learner_of(config, 1)
        (targets,) = targets_of(config, learner, [batch], weights)
        found[name] = float(learner(batch, targets, weights)["total"].detach())
    assert found["nearest"] == found["all_ranks"] and found["two"] < found["nearest"]
    # groups of one sample have no neighbours
    assert found["groups"] == 0.0
