"""Train adapters in shards and without an engine, and print how far they differ as JSON (rank 0).

Run by test_lora.py on one and two ranks: ``lora_steps.py DTYPE CHECKPOINTING LORA``; LORA is JSON of ``model.lora``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from streamtrain.config.load import build, merge
from streamtrain.engine.deepspeed_compat import shard_of
from streamtrain.engine.runtime import Launch, init_process_group
from streamtrain.model.initialise import initialise
from streamtrain.training.build import Networks, restore
from streamtrain.training.ssl_model import SSLModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sharded_step import (
    ACCUMULATION,
    MICRO_BATCH,
    MOMENTUM,
    TEMPERATURE,
    WEIGHTS,
    batch_of,
    config_of,
    plain_step,
    whole,
)

STEPS, LR, DECAY = 4, 1e-2, 0.1


def main() -> None:
    dtype, checkpointing, lora = sys.argv[1:]
    launch = Launch.from_environment()
    changes = {
        "model": {"lora": json.loads(lora)},
        "objective": {"anchor": {"weight": 1.0}},
        "optim": {"clip": 0.0, "layer_decay": 1.0, "eps": 1e-6},
        "data": {"global_batch": MICRO_BATCH * ACCUMULATION * launch.world_size},
    }
    config = build(merge(config_of(dtype, checkpointing, "1").model_dump(), changes))
    with init_process_group(config.engine, launch) as runtime:
        networks = Networks.build(config, runtime)
        student, teacher, maker = networks.student, networks.teacher, networks.target_maker
        restore(config, None, student, teacher, maker, anchor=networks.anchor)
        plain, plain_teacher = SSLModel(config), SSLModel(config)
        for network in (plain, plain_teacher):
            initialise(network, config.model, config.run.seed)
        trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
        assert trained.keys() == student.parameters.keys()
        matrices = [p for p in trained.values() if p.dim() > 1]
        vectors = [p for p in trained.values() if p.dim() == 1]
        groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors}]
        adamw = torch.optim.AdamW(groups, LR, config.optim.betas, config.optim.eps, weight_decay=0.0)
        base = {name: shard_of(p).clone() for name, p in student.frozen.items()}
        report: dict[str, Any] = {"loss": 0.0, "frozen": len(base)}

        for step in range(STEPS):
            student.set_rates(LR, DECAY, last_layer_frozen=False)
            batches = [batch_of(config, step, runtime.rank, micro) for micro in range(ACCUMULATION)]
            features = [teacher.teacher_features(batch, WEIGHTS) for batch in batches]
            targets = maker.make(features, networks.teacher_prototypes, TEMPERATURE)
            losses = []
            for batch, target in zip(batches, targets, strict=True):
                losses.append(student.accumulate(batch, target, WEIGHTS)["total"])
                student.step()
            teacher.update(MOMENTUM)
            mean = torch.stack(losses).mean()
            dist.all_reduce(mean)
            world = range(runtime.world_size)
            everything = [batch_of(config, step, rank, micro) for rank in world for micro in range(ACCUMULATION)]
            adamw.zero_grad()
            expected = plain_step(config, plain, plain_teacher, everything)
            adamw.step()
            named_teacher = dict(plain_teacher.named_parameters())
            for name, parameter in trained.items():
                named_teacher[name].data.lerp_(parameter.data, 1 - MOMENTUM)
            report["loss"] = max(report["loss"], abs(float(mean) / runtime.world_size - float(expected["loss"])))

        errors: dict[str, float] = {"master": 0.0, "ema": 0.0, "moved": 1e9}
        start = SSLModel(config)
        initialise(start, config.model, config.run.seed)
        before, named_teacher = dict(start.named_parameters()), dict(plain_teacher.named_parameters())
        for name, parameter in trained.items():
            shape = student.fragments[name].shape
            moved = float((parameter - before[name]).norm())
            scale = max(moved, 1e-6)
            errors["moved"] = min(errors["moved"], moved)
            for kind, got, want in (
                ("master", student.master(name), parameter), ("ema", teacher.ema_shard(name), named_teacher[name]),
            ):  # fmt: skip
                errors[kind] = max(errors[kind], float((whole(got, shape) - want).norm()) / scale)
        report |= errors
        report["is_base_unchanged"] = all(torch.equal(shard_of(student.frozen[name]), base[name]) for name in base)
        report["is_base_shared"] = all(
            shard_of(teacher.parameters[name]).data_ptr() == shard_of(p).data_ptr()
            for name, p in student.frozen.items()
        )
        # after training, the anchor still computes the features of the start
        batch = batch_of(config, 0, runtime.rank, 0)
        with torch.no_grad():
            anchor, unmasked = networks.anchor.targets(batch, 1.0), start.features(batch.global_crops)
        assert anchor is not None and anchor.cls is not None and anchor.patches is not None
        pairs = ((anchor.cls, unmasked.cls), (anchor.patches, unmasked.patches))
        report["anchor"] = max(float((got.float() - want).abs().max()) for got, want in pairs)
        if runtime.rank == 0:
            print(json.dumps(report), flush=True)


main()
