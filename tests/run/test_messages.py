"""The lines that a run shows at its start and end."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from streamtrain.config.load import build
from streamtrain.run.messages import command_text, completed_text, configuration_line, typed_command


def line(world_size: int, keys: dict[str, Any], device: str = "cpu") -> str:
    return configuration_line(build(keys), "my.yaml", 12_345, world_size, device)


def test_the_configuration_is_one_line() -> None:
    keys = {"run": {"dir": "runs/x", "steps": 50}, "data": {"shards": "sets/y", "micro_batch": 4, "global_batch": 16}}
    text = line(2, {**keys, "model": {"preset": "vitb16"}})
    assert text == (
        "my.yaml: vitb16; 12,345 images in sets/y; batch 16 = 4 x 2 ranks x 2 micro-batches; lr 0.001; "
        "50 steps on 2 CPU ranks; run directory runs/x"
    )
    assert "batch 4; lr" in line(1, {"data": {"micro_batch": 4}}) and "on 1 CPU rank;" in line(1, keys)
    assert "batch 16 = 4 x 4 ranks; " in line(4, keys, "cuda") and "on 4 GPUs;" in line(4, keys, "cuda")
    assert "ViT of width 192 and depth 12" in line(1, {"model": {"dim": 192, "num_heads": 3}})
    assert "ViT of width 384 and depth 3" in line(1, {"model": {"preset": "vits16", "depth": 3}})


@pytest.mark.parametrize(("scaling", "lr"), [("sqrt", "0.0005"), ("linear", "0.00025")])
def test_the_configuration_has_the_scaled_learning_rate(scaling: str, lr: str) -> None:
    keys = {
        "data": {"micro_batch": 16, "global_batch": 256}, "schedules": {"lr": 1e-3},
        "optim": {"lr_scaling": scaling, "lr_reference_batch": 1024},
    }  # fmt: skip
    assert f"lr {lr} (0.001 scaled to the batch)" in line(2, keys)


def test_the_end_names_results_and_commands_for_a_shell() -> None:
    config = build({"run": {"dir": "my runs/a", "steps": 7}, "data": {"shards": "sets/y"}})
    first, second, _, *commands = completed_text(config, 3, "2.50 s", "1.10 min", "sets/y").splitlines()
    assert (
        first == "completed 7 steps; this start: 3 in 2.50 s, 1.10 min in all"
        and "my runs/a: checkpoints/step-000000007" in second
    )
    words = [shlex.split(command) for command in commands]
    assert [command[:2] for command in words] == [["streamtrain", name] for name in ("evaluate", "report", "export")]
    assert all("my runs/a" in command for command in words)
    assert "evaluate" not in completed_text(config, 3, "2.50 s", "1.10 min", None)
    assert completed_text(config, 3, "2.50 s", "1.10 min", None, health="health: x").splitlines()[2] == "health: x"
    assert command_text(["train", "a.b=c d"]) == "streamtrain train 'a.b=c d'"
    typed = ["train", "--gpus", "2", "data.shards=https://me:secret@host/set", "run.dir=a"]
    assert typed_command(typed) == "streamtrain train --gpus 2 data.shards=https://host/set run.dir=a"
