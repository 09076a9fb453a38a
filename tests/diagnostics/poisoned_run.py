"""Train as ``main.py`` does, with non-finite values injected at some steps: ``poisoned_run.py PLAN ARGUMENTS``.

PLAN is JSON: ``{"what": "gradient" | "loss" | "weight", "rank": R, "steps": [..]}``. The values are injected by hooks
on the student's modules. A successful run prints the number of updates of its optimiser.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

import streamtrain.training.build
from streamtrain.main import main

PLAN = json.loads(sys.argv.pop(1))
build = streamtrain.training.build.build_networks


networks: list[Any] = []


def build_with_hooks(config: Any, runtime: Any, accumulation: int) -> Any:
    student, teacher = build(config, runtime, accumulation)
    global_batch, _ = config.batch_split(runtime.world_size)
    network = student._engine.module
    now = [0]

    def note_step(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        now[0] = int(inputs[1].slots[0]) // global_batch + 1

    def is_target(what: str) -> bool:
        return PLAN["what"] == what and now[0] in PLAN["steps"] and runtime.rank == PLAN["rank"]

    def spoil_gradient(module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if is_target("gradient"):
            output.register_hook(lambda gradient: gradient * float("nan"))

    def spoil_loss(module: torch.nn.Module, inputs: tuple[Any, ...], output: dict[str, torch.Tensor]) -> Any:
        if is_target("weight"):
            # a parameter that the backward does not read
            student.master("backbone.norm.bias")[0] = float("nan")
        # a constant, so the gradient stays finite
        return {**output, "total": output["total"] + float("inf")} if is_target("loss") else output

    networks.append(student)
    network.register_forward_pre_hook(note_step)
    network.register_forward_hook(spoil_loss)
    network.backbone.norm.register_forward_hook(spoil_gradient)
    return student, teacher


streamtrain.training.build.build_networks = build_with_hooks
status = main()
if not status:
    counts = {int(state["step"]) for state in networks[0]._adamw.state.values()}
    print(f"updates {counts}", flush=True)
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
