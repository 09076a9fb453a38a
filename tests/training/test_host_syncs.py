"""A step performs no host sync: it never waits for a GPU to read a value back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from host_syncs import ForbidHostSyncs, cuda_syncs_raise

from streamtrain.config.load import build
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch, Masks
from streamtrain.engine.gradients import ModuleClipping
from streamtrain.engine.moments import moments_maker
from streamtrain.engine.optim import AdamW, parameter_groups, set_rates
from streamtrain.model.initialise import initialise
from streamtrain.objective.gram import GramTargets
from streamtrain.objective.prototypes import PlainWeight, prototype_mass
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.training.ssl_model import FrozenBackbone, LossWeights, SSLModel

B, V, L = 4, 2, 2
HEAD = {"prototypes": 200, "hidden": 24, "bottleneck": 12}


def config_of(*, objective: dict[str, Any] | None = None, engine: dict[str, Any] | None = None) -> Config:
    return build(
        {
            "data": {"micro_batch": B},
            "crops": {"global_size": 32, "local_size": 16, "global_count": V, "local_count": L},
            "model": {"patch_size": 8, "dim": 24, "depth": 2, "num_heads": 2, "drop_path": 0.3, "rope_rescale": 2.0},
            "objective": {
                "global_loss": {"head": HEAD}, "patch_loss": {"head": HEAD}, "chunk_bytes": 2**16, **(objective or {})
            },
            "engine": engine or {},
        }
    )  # fmt: skip


def batch_on(device: torch.device) -> Batch:
    """Return noise, with masks of half of the patches and padding."""
    pixels = [torch.randint(0, 256, (n * B, s, s, 3), dtype=torch.uint8, device=device) for n, s in ((V, 32), (L, 16))]
    grid_mask = torch.zeros(V * B, 16, dtype=torch.bool, device=device)
    grid_mask[:, ::2] = True
    index = torch.arange(0, V * B * 16, 2, device=device)
    rows = len(index) + 4
    index = torch.cat([index, index.new_zeros(4)])
    weight = torch.full((rows,), 1 / 8, device=device)
    weight[-4:] = 0
    return Batch(torch.arange(B).numpy(), pixels[0], pixels[1], Masks(grid_mask, index, weight))


class GeneratorOfCpu(torch.Generator):
    """A CPU generator in place of one on the meta device, which does not exist."""

    def __new__(cls, device: torch.device) -> torch.Generator:
        return super().__new__(cls, "cpu")


def step(config: Config, student: SSLModel, teacher: SSLModel, batch: Batch) -> None:
    """Run the teacher pass, the targets, and the student's forward and backward."""
    heads = (teacher.global_head, teacher.patch_head)
    handles = TeacherPrototypes(*(head and PlainWeight(head.prototypes.weight) for head in heads))
    weights = LossWeights(gram=1.0)
    features = teacher.teacher_features(batch, weights)
    (targets,) = TargetMaker(config.objective).make([features], handles, 0.05)
    gram = FrozenBackbone(config).to(batch.global_crops.device)
    asked = GramTargets(gram(batch.global_crops, (4, 4)).patches, "image", "drop", "masked", 2**20)
    prototype_mass(features.global_features, handles.global_head, 0.05, 2**20)
    student.student_losses(batch, replace(targets, gram=asked), weights)["total"].backward()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"centering": "softmax", "patch_loss": {"kind": "l2"}, "koleo": {"neighbours": 2}},
        {"patch_loss": {"kind": "cosine"}, "koleo": {"distributed": True}},
    ],
    ids=["sinkhorn", "softmax", "cosine"],
)
def test_a_step_of_both_networks_reads_no_value(
    objective: dict[str, Any], checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # meta tensors take the code paths of a GPU and fail where a value is read
    monkeypatch.setattr(torch, "Generator", GeneratorOfCpu)
    config = config_of(objective=objective, engine={"checkpointing": checkpointing})
    with torch.device("meta"):
        student, teacher = SSLModel(config), SSLModel(config)
    step(config, student, teacher, batch_on(torch.device("meta")))
    assert student.backbone.embedding.cls_token.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_both_networks_waits_for_no_gpu(dtype: torch.dtype) -> None:
    config, device = config_of(), torch.device("cuda")
    networks = [SSLModel(config), SSLModel(config)]
    for seed, network in enumerate(networks):
        initialise(network, config.model, seed)
        network.to(device, dtype)
    batch = batch_on(device)
    step(config, *networks, batch)
    torch.cuda.synchronize()
    with cuda_syncs_raise():
        step(config, *networks, batch)


READERS: dict[str, Callable[[torch.Tensor], object]] = {
    "bool": lambda x: bool(x.any()), "item": lambda x: x[0].item(), "mask": lambda x: x[x > 1],
    "nonzero": lambda x: x.nonzero(), "assigned": lambda x: x.__setitem__(x > 1, 0.0), "unique": lambda x: x.unique(),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_reading_a_value_is_detected(name: str) -> None:
    for device in ("cpu", "meta"):
        if name == "assigned" and device == "meta":
            continue
        values = torch.ones(3, device=device)
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), ForbidHostSyncs():
            READERS[name](values)


@pytest.mark.parametrize("moments", ["device", "host", "8bit"])
def test_clipping_and_the_optimiser_read_no_value(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
    config = config_of(engine={"moments": moments})
    named = [(f"backbone.blocks.{n}.mlp.up.weight", torch.nn.Parameter(torch.ones(600))) for n in range(2)]
    make_moments = moments_maker(config.engine, None, torch.device("cpu"))
    adamw = AdamW(parameter_groups(named, 2, config.optim), config.optim, make_moments)
    clipping = ModuleClipping(dict(named), 0.1)
    # the first step sets up the moments
    for watched in (False, True):
        for _, parameter in named:
            parameter.grad = torch.rand(600)
        set_rates(adamw.param_groups, 1e-2, 0.1, last_layer_frozen=False)
        with ForbidHostSyncs() if watched else torch.no_grad():
            clipping.apply((parameter, parameter.grad) for _, parameter in named)
            adamw.divisor = torch.ones(())
            adamw.step()
