"""Compare five sharded optimiser steps with plain unsharded arithmetic on every rank; rank 0 prints JSON.

Run by test_zero.py on one and two ranks: ``sharded_step.py DTYPE CHECKPOINTING VIEW_GROUPS [COMPILE [KERNELS]]``. With
COMPILE=on or KERNELS=on|off, drop-path and RoPE rescaling are random too, and with KERNELS the sizes suit the CPU
kernels; the reference uses neither.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from shards.randomness import generator
from streamtrain.config.load import build, merge
from streamtrain.config.masks import max_rows
from streamtrain.config.tree import Config
from streamtrain.data.batch import Batch
from streamtrain.data.masking import draw_masks, rasterise
from streamtrain.engine.deepspeed_compat import cloned_world_group, full_numel, is_gathered
from streamtrain.engine.runtime import Launch, init_process_group
from streamtrain.model.initialise import initialise
from streamtrain.objective.prototypes import PlainWeight
from streamtrain.objective.targets import TargetMaker, TeacherPrototypes
from streamtrain.planning.memory import plan
from streamtrain.training.build import build_networks, restore
from streamtrain.training.ssl_model import LossWeights, SSLModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cpu_kernels import record_kernel_calls
from host_syncs import ForbidHostSyncs

from benchmarks.collective_traffic import Traffic

HEADS = ("global_head", "patch_head")
STEPS, ACCUMULATION, MICRO_BATCH = 5, 2, 3
# height and width in pixels
GLOBAL, LOCAL = (16, 64), (16, 16)
WEIGHTS = LossWeights(1.0, 1.0, 0.1)
TEMPERATURE, MOMENTUM = 0.05, 0.9


def config_of(dtype: str, checkpointing: str, view_groups: str, compile: str = "off", kernels: str = "") -> Config:
    head = {"prototypes": 101, "hidden": 24, "bottleneck": 12}
    random = {"drop_path": 0.3, "rope_rescale": 2.0} if compile == "on" or kernels else {"drop_path": 0.0}
    sizes = {"dim": 64, "num_heads": 2} if kernels else {"dim": 36, "num_heads": 3}
    return build(
        {
            "run": {"dir": "nowhere"},
            "data": {"micro_batch": MICRO_BATCH},
            "crops": {"global_size": GLOBAL, "local_size": LOCAL, "local_count": 2},
            "model": {"patch_size": 8, "depth": 3, "layerscale": 0.5, **sizes, **random},
            # chunks of four and two of the six images
            "teacher": {"chunk": 4},
            "objective": {"global_loss": {"head": head}, "patch_loss": {"head": head}},
            "optim": {"clip": 0.5, "layer_decay": 0.8},
            "engine": {
                "dtype": dtype,
                "device": "cpu",
                "cpu_threads": 1,
                "checkpointing": checkpointing,
                "view_groups": int(view_groups),
                "compile": compile,
                "cpu_kernels": kernels != "off",
                "collective_timeout_seconds": 123,
            },
        }
    )


def batch_of(config: Config, step: int, rank: int, micro: int) -> Batch:
    """Return a micro-batch of noise, which any rank can reproduce."""
    draw = generator(0, "noise", step * 100 + rank * 10 + micro)
    slots = (step * 100 + rank * 10 + micro * MICRO_BATCH) + torch.arange(MICRO_BATCH).numpy()
    grid = config.crops.global_size.grid(config.model.patch_size)
    parameters = draw_masks(config.masks, 0, slots, 2, grid)
    pixels = [
        torch.from_numpy(draw.integers(0, 256, (count * MICRO_BATCH, *size, 3), dtype="uint8"))
        for count, size in ((2, GLOBAL), (2, LOCAL))
    ]
    masks = rasterise(parameters, grid, max_rows(config.masks, MICRO_BATCH, 2, 16, 1), "cpu")
    return Batch(slots, pixels[0], pixels[1], masks)


def main() -> None:
    config, launch = config_of(*sys.argv[1:]), Launch.from_environment()
    traffic, called = Traffic(), record_kernel_calls(setattr)
    with init_process_group(config.engine, launch) as runtime:
        world = range(runtime.world_size)
        student, teacher = build_networks(config, runtime, ACCUMULATION)
        maker = TargetMaker(config.objective)
        restore(config, None, student, teacher, maker)
        teacher_prototypes = TeacherPrototypes(*(teacher.weight(f"{head}.prototypes.weight") for head in HEADS))

        plain, plain_teacher = SSLModel(config), SSLModel(config)
        for network in (plain, plain_teacher):
            initialise(network, config.model, config.run.seed)
            for block in network.backbone.blocks:
                block.options = replace(block.options, implementation="reference")
        ema = {name: p.detach().clone() for name, p in plain.named_parameters()}
        report: dict[str, Any] = {"gradient": 0.0, "ema": 0.0, "loss": 0.0, "live": 0}
        hooks = record_live_blocks(student, report)

        for step in range(STEPS):
            if step == 2:
                torch.compiler.set_stance("fail_on_recompile")
            student.set_rates(1e-3, 0.04, last_layer_frozen=False)
            batches = [batch_of(config, step, runtime.rank, micro) for micro in range(ACCUMULATION)]
            traffic.reset()
            # In the first step the engine compares the traced order of modules between ranks. CPU kernels may read
            # values, and under this mode torch would compile again.
            is_checked = step > 0 and config.engine.dtype == "fp32" and not config.engine.compile
            reading = ForbidHostSyncs if is_checked else nullcontext
            with reading():
                features = [teacher.teacher_features(batch, WEIGHTS) for batch in batches]
                targets = maker.make(features, teacher_prototypes, TEMPERATURE)
            losses = []
            for micro, (batch, target) in enumerate(zip(batches, targets, strict=True)):
                with reading():
                    losses.append(student.accumulate(batch, target, WEIGHTS)["total"])
                if step == 0 and micro == ACCUMULATION - 1:
                    everything = [batch_of(config, 0, rank, m) for rank in world for m in range(ACCUMULATION)]
                    expected = plain_step(config, plain, plain_teacher, everything)
                    for name, parameter in student.parameters.items():
                        got, want = safe_get_full_grad(parameter), expected[name]
                        error = float((got.double() - want).norm() / want.norm().clamp_min(1e-12))
                        report["gradient"] = max(report["gradient"], error)
                    mean = torch.stack(losses).mean()
                    dist.all_reduce(mean)
                    report["loss"] = abs(float(mean) / runtime.world_size - float(expected["loss"]))
                student.step()
            if step == 0:
                report |= clipping_errors(config, student, expected)
            with reading():
                teacher.update(MOMENTUM)
            gathered = traffic.gathered_bytes
            for name in student.parameters:
                ema[name].lerp_(whole(student.master(name), student.fragments[name].shape), 1 - MOMENTUM)
        hooks.clear()
        # In units of the parameters that a rank does not own: the student twice a micro-batch and the teacher once; the
        # targets need the teacher's prototypes once more, once a step.
        others = (runtime.world_size - 1) / runtime.world_size * runtime.dtype.itemsize
        numel = sum(fragment.numel * runtime.world_size for fragment in student.fragments.values())
        prototypes = sum(full_numel(teacher.parameters[f"{head}.prototypes.weight"]) for head in HEADS)
        report["gathered"] = (gathered - prototypes * others) / max(1.0, ACCUMULATION * numel * others)
        global_batch = MICRO_BATCH * ACCUMULATION * runtime.world_size
        whole_step = build(merge(config.model_dump(), {"data": {"global_batch": global_batch}}))
        planned = plan(whole_step, runtime.world_size, on_gpu=False, bf16=runtime.dtype == torch.bfloat16)
        report["gathered_of_plan"] = gathered / max(1, planned.all_gather_bytes_per_step)

        for name, parameter in teacher.parameters.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                kept = whole(teacher.ema_shard(name), student.fragments[name].shape)
                report["ema"] = max(report["ema"], float((kept - ema[name]).abs().max()))
                assert torch.equal(parameter.detach(), kept.to(parameter.dtype)), name
        moved = max(float((ema[name] - p.detach()).abs().max()) for name, p in plain_teacher.named_parameters())
        evaluate(teacher)
        report["graphs"] = compiled_graphs()
        # a step without the patch loss uses fewer rows, so its shapes differ
        torch.compiler.set_stance("default")
        student.set_rates(0.0, 0.0, last_layer_frozen=False)
        none, late, early = (
            head_gradient(config, runtime.rank, student, maker, teacher_prototypes, teacher, micros)
            for micros in ([(0, 0.0), (1, 0.0)], [(0, 0.0), (1, 0.1)], [(1, 0.1), (0, 0.0)])
        )
        stale, swapped = float(none.abs().max()), float((late - early).abs().max() / early.abs().max())
        if runtime.rank == 0:
            groups = (dist.group.WORLD, cloned_world_group())
            timeouts = [group._get_backend(runtime.device).options._timeout.total_seconds() for group in groups]
            report |= {"moved": moved, "stale": stale, "swapped": swapped}
            report |= {"timeouts": timeouts, "called": len(called)}
            print(json.dumps(report), flush=True)


def evaluate(teacher: Any) -> None:
    """Compute features of an image size that no step has, on all ranks."""
    features = teacher.features(torch.zeros(1, 48, 40, 3, dtype=torch.uint8))
    assert features.patches.shape[1] == 6 * 5


def compiled_graphs() -> tuple[int, int]:
    """Return the numbers of compiled graphs and of graph breaks so far."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def clipping_errors(config: Config, student: Any, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the errors of the first update's moments and gradient norm, given the ``expected`` unclipped gradient."""
    gradients = {name: value for name, value in expected.items() if name != "loss"}
    norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
    assert norm > 1.5 * config.optim.clip
    share, shards, error = (1 - config.optim.betas[0]) * config.optim.clip / norm, student.shards(), 0.0
    for name, gradient in gradients.items():
        moment = whole(shards[f"exp_avg/{name}"].read(), student.fragments[name].shape)
        error = max(error, float((moment - share * gradient).norm() / (share * gradient).norm().clamp_min(1e-12)))
    return {"moment": error, "norm": abs(float(student.gradient_norms()["optim/gradient_norm"]) / norm - 1)}


def head_gradient(
    config: Config, rank: int, student: Any, maker: TargetMaker, teacher_prototypes: Any, teacher: Any,
    micros: list[tuple[int, float]],
) -> torch.Tensor:  # fmt: skip
    """Return the patch head's gradient in a step of ``micros``: pairs of a micro-batch and its patch loss weight."""
    for micro, weight in micros:
        weights, batch = LossWeights(1.0, weight, 0.1), batch_of(config, STEPS, rank, micro)
        (targets,) = maker.make([teacher.teacher_features(batch, weights)], teacher_prototypes, TEMPERATURE)
        student.accumulate(batch, targets, weights)
        if (micro, weight) == micros[-1]:
            names = [name for name in student.parameters if name.startswith("patch_head")]
            gradient = torch.cat([safe_get_full_grad(student.parameters[name]).flatten() for name in names])
        student.step()
    return gradient


def plain_step(
    config: Config, plain: SSLModel, plain_teacher: SSLModel, batches: list[Batch]
) -> dict[str, torch.Tensor]:
    """Return the gradients and the loss of one step over all ranks' micro-batches, without an engine."""
    weights = (PlainWeight(getattr(plain_teacher, head).prototypes.weight) for head in HEADS)
    teacher_prototypes = TeacherPrototypes(*weights)
    features = [plain_teacher.teacher_features(batch, WEIGHTS) for batch in batches]
    # this process has the rows of all ranks
    with mock.patch.object(dist, "get_world_size", return_value=1):
        targets = TargetMaker(config.objective).make(features, teacher_prototypes, TEMPERATURE)
    losses = [plain.student_losses(*each, WEIGHTS)["total"] for each in zip(batches, targets, strict=True)]
    total = torch.stack(losses).mean()
    total.backward()
    gradients = {name: p.grad.double() for name, p in plain.named_parameters() if p.grad is not None}
    return {**gradients, "loss": total.detach()}


def whole(fragment: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the full parameter, gathered from every rank's fragment."""
    pieces = [torch.empty_like(fragment) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, fragment.contiguous())
    return torch.cat(pieces)[: torch.Size(shape).numel()].reshape(shape)


def record_live_blocks(student: object, report: dict[str, Any]) -> list[object]:
    """Install hooks that record the most gathered student parameters, in blocks."""
    blocks = student._engine.module.backbone.blocks
    size = sum(full_numel(p) for p in blocks[0].parameters())

    def count(*_: object) -> None:
        live = sum(full_numel(p) for p in (*student.parameters.values(), *student.frozen.values()) if is_gathered(p))
        report["live"] = max(report["live"], live / size)

    handles = [block.register_full_backward_hook(count) for block in blocks]
    handles += [block.register_forward_hook(count) for block in blocks]
    return handles


if __name__ == "__main__":
    main()
