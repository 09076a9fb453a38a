"""A run resumed on another number of ranks (2, 1, 3) with another setting of engine.moments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from training.test_loop import command, expect_success, losses, shards  # noqa: F401 - a fixture

from streamtrain.checkpoint import reader as checkpoint

RELOAD = Path(__file__).with_name("reload_checkpoint.py")
# divisible by 1, 2 and 3 ranks x micro-batches of 2, which is also the size of KoLeo's groups
FIXED = (
    "crops.global_size=[24, 40]",
    "crops.local_size=[24, 16]",
    "data.global_batch=12",
    "data.micro_batch=2",
    "run.keep_last=0",
    "run.checkpoint_every=0",
)
# schedules that do not depend on run.steps
CONSTANT = {"lr": "peak: 1.0e-3, warmup: 2", "weight_decay": "peak: 0.04", "momentum": "peak: 0.99",
            "teacher_temperature": "peak: 0.05, warmup: 2"}  # fmt: skip
SCHEDULES = [f"schedules.{name}={{kind: constant, end: null, {rest}}}" for name, rest in CONSTANT.items()]
# ranks, the last step, engine.moments
PARTS = ((2, 3, "host"), (1, 5, "disk"), (3, 8, "device"))


def whole_state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Return every master, moment and EMA, gathered."""
    with checkpoint.open_checkpoint(checkpoint.step_folder(run_dir, step)) as reader:
        kinds = ("master", "exp_avg", "exp_avg_sq", "ema")
        keys = [f"{kind}/{name}" for kind in kinds for name in reader.state["shapes"]]
        return {key: reader.read_full(key) for key in keys}


@pytest.mark.slow
def test_two_one_three_ranks(shards: Path, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    settings = (*FIXED, *SCHEDULES, "engine.dtype=fp32")
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    expect_success(run_ranks(command(shards, straight, *settings, "run.steps=8"), 1))
    for world_size, steps, moments in PARTS:
        words = command(shards, changing, *settings, f"run.steps={steps}", f"engine.moments={moments}")
        expect_success(run_ranks(words, world_size))
        following = {2: 1, 1: 3, 3: 2}[world_size]
        out = tmp_path / f"{world_size}-to-{following}"
        expect_success(run_ranks([RELOAD, changing, out, moments], following))
        before, after = whole_state(changing, steps), whole_state(out, steps)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    ours, theirs = losses(changing), losses(straight)
    assert [record["slot"] for record in ours.values()] == [record["slot"] for record in theirs.values()]
    for step, record in theirs.items():
        for name in ("loss/total", "loss/global", "loss/patch", "loss/koleo"):
            assert ours[step][name] == pytest.approx(record[name], abs=1e-3), (step, name)
