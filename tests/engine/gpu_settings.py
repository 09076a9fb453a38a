"""A rank that takes the same steps with the engine settings of a CPU and of a GPU; rank 0 prints JSON.

``gpu_settings.py DTYPE CHECKPOINTING:VIEW_GROUPS...``: for each form of activation checkpointing, the losses and this
rank's weights, moments and EMA after two steps are compared bit by bit.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch._dynamo
from deepspeed.accelerator import get_accelerator
from sharded_step import ACCUMULATION, batch_of, config_of
from streams import Streams

from streamtrain.config.load import build, merge
from streamtrain.config.tree import Config
from streamtrain.engine.runtime import Launch, Runtime, init_process_group
from streamtrain.engine.zero import engine_config
from streamtrain.training import build as build_module
from streamtrain.training.build import Networks, restore
from streamtrain.training.step import train_step

STEPS = 2


def gpu_engine_config(config: Config, runtime: Runtime, accumulation: int, block_numel: int) -> dict[str, Any]:
    """Return the engine's settings for a GPU."""
    return engine_config(config, replace(runtime, device=torch.device("cuda", 0)), accumulation, block_numel)


def take_steps(config: Config, runtime: Runtime, is_gpu: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Return the results of two steps, and the number of ``record_stream`` calls of the engine."""
    streams, accelerator, calls = Streams(), type(get_accelerator()), []
    with ExitStack() as stack:
        if is_gpu:
            stack.enter_context(streams.installed(accelerator, is_recorded=False))
            stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda *call: calls.append(call)))
            stack.enter_context(mock.patch.object(build_module, "engine_config", gpu_engine_config))
        networks = Networks.build(config, runtime)
        restore(config, None, networks.student, networks.teacher, networks.target_maker)
        values = {}
        for step in range(1, STEPS + 1):
            loader = iter([batch_of(config, step, runtime.rank, micro) for micro in range(ACCUMULATION)])
            result = train_step(
                step, config, runtime, networks, loader,
                wrap=lambda items: items, before_update=lambda: None, stop_request=lambda: 0,
            )  # fmt: skip
            scalars = {**result.mean_losses, **result.gradient_norms}
            values |= {f"{name} of step {step}": torch.tensor(value) for name, value in scalars.items()}
        shards = networks.student.shards() | networks.teacher.shards()
        values |= {name: shard.read().clone() for name, shard in shards.items()}
    return values, len(calls)


def main(dtype: str, *forms: str) -> None:
    launch, found = Launch.from_environment(), {}
    for form in forms:
        checkpointing, view_groups = form.split(":")
        small = config_of(dtype, checkpointing, view_groups, "off", "off").model_dump()
        batch = small["data"]["micro_batch"] * ACCUMULATION * launch.world_size
        found[form] = build(merge(small, {"data": {"global_batch": batch}, "run": {"steps": STEPS}}))
    report = {}
    with init_process_group(found[forms[0]].engine, launch) as runtime:
        for form, config in found.items():
            (expected, _), (values, calls) = (take_steps(config, runtime, is_gpu) for is_gpu in (False, True))
            assert expected.keys() == values.keys()
            differing = [name for name in expected if not torch.equal(expected[name], values[name])]
            report[form] = {"values": len(values), "differing": differing, "calls": calls}
        if runtime.rank == 0:
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
