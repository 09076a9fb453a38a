"""The sharded step equals plain arithmetic in gradients and EMA, and gathers no more than planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernels import DTYPES, REASON
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("sharded_step.py")
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.mark.parametrize(
    ("world_size", "dtype", "checkpointing", "view_groups"),
    # two ranks with block are in the test with kernels too
    [(1, "fp32", "none", 1), pytest.param(2, "fp32", "block", 1, marks=pytest.mark.slow), (2, "fp32", "selective", 2)],
)
def test_sharded_steps_equal_unsharded_steps(world_size: int, dtype: str, checkpointing: str, view_groups: int) -> None:
    assert check_steps(world_size, dtype, checkpointing, str(view_groups))["graphs"] == [0, 0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sharded_steps_with_kernels_equal_unsharded_steps(dtype: str) -> None:
    report = check_steps(2, dtype, "block", "1", "off", "on")
    # 8 steps x 2 micro-batches x 3 blocks x 2 branches x (teacher, forward, backward); and one evaluation
    assert report["called"] == (8 * 2 * 3 * 2 * 3 + 3 * 2 if TYPES[dtype] in DTYPES else 0)


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason=REASON)
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["block", "none"])
def test_kernels_are_as_accurate_as_torch(checkpointing: str) -> None:
    """In bf16; in fp32 the reference itself rounds like torch."""
    torch_only, kernels = (check_steps(2, "bf16", checkpointing, "1", "off", use) for use in ("off", "on"))
    assert torch_only["called"] == 0 and kernels["called"] > 0
    assert kernels["gradient"] <= 1.2 * torch_only["gradient"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "dtype", "checkpointing", "view_groups"),
    [(2, "fp32", "block", 1), (1, "fp32", "none", 1), (2, "fp32", "selective", 2), (1, "bf16", "block", 1)],
)
def test_compiled_steps_equal_eager_steps(world_size: int, dtype: str, checkpointing: str, view_groups: int) -> None:
    report = check_steps(world_size, dtype, checkpointing, str(view_groups), "on")
    # the student's block with drop-path and its last block; the teacher's block and its last attention, for a chunk and
    # for the smaller last chunk; the teacher's last MLP. Later steps must not compile.
    assert report["graphs"] == [2 + 2 * 2 + 1, 0]


def check_steps(world_size: int, dtype: str, *arguments: str) -> dict[str, Any]:
    results = run_ranks([SCRIPT, dtype, *arguments], world_size)
    assert [code for code, _, _ in results] == [0] * world_size, results[0][2][-2000:] + results[-1][2][-2000:]
    report: dict[str, Any] = json.loads(results[0][1].splitlines()[-1])
    # accumulation, uneven fragments, two prototype heads
    assert report["gradient"] < (1e-4 if dtype == "fp32" else 0.2)
    assert report["loss"] < (1e-5 if dtype == "fp32" else 0.05)
    # clipped by the norm over all ranks
    assert report["moment"] < (1e-4 if dtype == "fp32" else 0.2)
    assert report["norm"] < (1e-5 if dtype == "fp32" else 0.05)
    # the EMA is fp32 in both dtypes, and the network computes from its rounded values
    assert report["ema"] < 1e-6
    assert report["moved"] > 1e-4
    # a parameter that takes part in no micro-batch has gradient 0, not that of an earlier step
    assert report["stale"] == 0.0
    # the order of micro-batches does not matter
    assert report["swapped"] < (1e-5 if dtype == "fp32" else 0.02)
    # of the world group and of DeepSpeed's clone of it
    assert report["timeouts"] == [123, 123]
    # the student releases each block after its forward
    assert report["live"] <= 3
    # each parameter is gathered once per pass
    assert report["gathered"] <= (3.01 if world_size > 1 else 0.0)
    # not exact, because small fragments are padded
    assert report["gathered_of_plan"] == pytest.approx(1.0 if world_size > 1 else 0.0, rel=0.02)
    return report
