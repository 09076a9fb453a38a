"""Computed FLOPs equal the count by torch in real forward and backward passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from streamtrain.config.load import build, load_config, merge
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, Masks
from streamtrain.model.initialise import initialise
from streamtrain.objective.gram import GramTargets
from streamtrain.objective.prototypes import PlainWeight
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.planning.flops import step_flops
from streamtrain.planning.memory import plan
from streamtrain.planning.peak import peak_flops
from streamtrain.training.ssl_model import FrozenBackbone, LossWeights, SSLModel

HEAD = {"prototypes": 96, "hidden": 40, "bottleneck": 24}
BASE: dict[str, Any] = {
    "data": {"micro_batch": 4},
    "model": {"patch_size": 8, "dim": 32, "depth": 3, "num_heads": 2, "drop_path": 0.25},
    "crops": {"global_size": 48, "local_size": 24, "local_count": 3},
    "masks": {"group": 4},
    "objective": {"global_loss": {"head": HEAD}, "patch_loss": {"head": {**HEAD, "hidden": 56}}},
    "engine": {"checkpointing": "none"},
}

# torch counts attention on GPUs only, and no matmul in place; add these operators
FORWARD, BACKWARD = (
    getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}") for suffix in ("", "_backward")
)
ATTENTION = {
    FORWARD: lambda query, key, value, *rest, **named: sdpa_flop_count(query, key, value),
    BACKWARD: lambda gradient, query, key, value, *rest, **named: 2 * sdpa_flop_count(query, key, value),
    torch.ops.aten.addmm_: lambda output, left, right, **named: 2 * math.prod((*left, right[1])),
}


def counted(config: Config) -> float:
    """Return torch's count for one step of one micro-batch."""
    student, teacher = SSLModel(config), SSLModel(config)
    for seed, network in enumerate((student, teacher)):
        initialise(network, config.model, seed)
    crops, draw = config.crops, torch.Generator().manual_seed(0)
    images = [
        torch.randint(
            0,
            256,
            (count * config.data.micro_batch, *size, config.model.channels),
            dtype=torch.uint8,
            generator=draw,
        )
        for count, size in ((crops.global_count, crops.global_size), (crops.local_count, crops.local_size))
    ]
    patches = crops.global_size.patches(config.model.patch_size)
    # masks of half of the crops, with ratios spread over [0.1, 0.5], as in the stream
    counts = [round((0.1 + 0.4 * (k + 0.5) / 4) * patches) for k in range(4)]
    mask = torch.zeros(len(images[0]), patches, dtype=torch.bool)
    for row, count in enumerate(counts):
        mask[row, :count] = True
    weight = (1 / mask.sum(1).clamp_min(1).float())[:, None].expand_as(mask)[mask]
    batch = Batch(torch.arange(4).numpy(), *images, Masks(mask, mask.flatten().nonzero()[:, 0], weight))
    weights = LossWeights(koleo=0.0, gram=1.0 if config.objective.gram.is_active else 0.0)
    heads = (teacher.global_head, teacher.patch_head)
    teacher_prototypes = TeacherPrototypes(*(head and PlainWeight(head.prototypes.weight) for head in heads))
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        features = teacher.teacher_features(batch, weights)
        (targets,) = TargetMaker(config.objective).make([features], teacher_prototypes, 0.05)
        if config.objective.gram.is_active:
            anchor = FrozenBackbone(config)
            initialise(anchor, config.model, 2)
            features = anchor(images[0], crops.global_size.grid(config.model.patch_size)).patches
            targets = type(targets)(**{**vars(targets), "gram": GramTargets(features, "image", "keep", "all", 2**20)})
        student.student_losses(batch, targets, weights)["total"].backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"engine": {"checkpointing": "selective"}},
        {"engine": {"checkpointing": "block"}},
        {"engine": {"checkpointing": "block", "view_groups": 2}},
        {"model": {"mlp": "swiglu", "drop_path": 0.0}, "objective": {"sinkhorn_iterations": 1}},
        {"objective": {"centering": "softmax", "gram": {"weight": 1.0}}},
        {"objective": {"patch_loss": {"kind": "l2"}}},
        {"crops": {"global_size": [32, 72], "local_size": [16, 32]}, "objective": {"gram": {"weight": 1.0}}},
        {
            "data": {"channels": 13},
            "crops": {
                "mean": [0.5],
                "std": [0.2],
                "jitter": {"probability": 0},
                "grey": 0,
                "solarize": {"global_probability": [0]},
            },
        },
        {"model": {"lora": {"rank": 4}}},
        {"model": {"lora": {"rank": 4, "targets": ["qkv"]}}, "engine": {"checkpointing": "block"}},
    ],
)
def test_executed_flops_equal_torch_count(changes: dict[str, Any]) -> None:
    config = build(merge(BASE, changes))
    flops = step_flops(config, 1)
    # torch does not count matrix-vector products, and step_flops no column sums
    assert flops.executed == pytest.approx(counted(config), rel=0.01)
    assert flops.model <= flops.executed


def test_flops_with_free_and_frozen_blocks_are_close_to_torch_count() -> None:
    config = build(merge(BASE, {"model": {"lora": {"rank": 1, "blocks": 1, "free_blocks": 1}}}))
    # step_flops counts adapters in every block
    assert step_flops(config, 1).executed == pytest.approx(counted(config), rel=0.02)


def test_recomputation_adds_no_model_flops() -> None:
    modes = [step_flops(build(merge(BASE, {"engine": {"checkpointing": mode}})), 1) for mode in ("none", "block")]
    assert modes[0].model == modes[1].model and modes[0].executed < modes[1].executed
    every = step_flops(build(merge(BASE, {"model": {"drop_path": 0.0}})), 1)
    assert modes[0].model < 0.9 * every.model


def test_alternating_sizes_are_averaged_and_ranks_added() -> None:
    mixed = build(merge(BASE, {"crops": {"sizes": [{"share": 3}, {"share": 1, "global_size": 96}]}}))
    small, large = (step_flops(mixed, 1, sizes).model for sizes in mixed.crop_sizes)
    assert small < large and step_flops(mixed, 1).model == pytest.approx((3 * small + large) / 4)
    assert step_flops(mixed, 4).model == pytest.approx(4 * step_flops(mixed, 1).model)
    accumulated = build(merge(BASE, {"data": {"global_batch": 16}}))
    assert step_flops(accumulated, 1).model == pytest.approx(4 * step_flops(build(BASE), 1).model)


def test_a_larger_frozen_teacher_costs_more() -> None:
    config = build({**merge(BASE, {"teacher": {"kind": "frozen", "weights": "somewhere"}}), "masks": {}})
    larger = config.model_copy(update={"model": build(merge(BASE, {"model": {"dim": 64}})).model})
    assert step_flops(config, 1, teacher=larger).model > 1.2 * step_flops(config, 1).model


def test_plan_uses_step_flops() -> None:
    config = load_config("giant.yaml")
    assert plan(config, 8).flops_per_step == step_flops(config, 8).executed


def test_peaks_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", bf16=True) == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", bf16=True) == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", bf16=True) == 312e12
    assert peak_flops("NVIDIA A10", bf16=True) == 125e12
    assert peak_flops("NVIDIA L4", bf16=False) == 30.3e12
    assert peak_flops("NVIDIA L40S", bf16=True) == 362e12
    assert peak_flops("AMD EPYC 7B13", bf16=True) is None
