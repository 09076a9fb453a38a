"""The sharded step equals plain arithmetic: gradients, averages, and what is alive meanwhile."""

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
    [(1, "fp32", "none", 1), (2, "fp32", "block", 1), (2, "fp32", "selective", 2)],
)
def test_sharded_steps_equal_unsharded_ones(
    world_size: int, dtype: str, checkpointing: str, view_groups: int
) -> None:
    assert check_steps(world_size, dtype, checkpointing, str(view_groups))["graphs"] == [0, 0]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sharded_steps_by_kernels_equal_unsharded_ones(dtype: str) -> None:
    report = check_steps(2, dtype, "block", "1", "off", "on")
    # teacher, forward and backward of eight steps of two micro-batches, three blocks of two branches; an evaluation
    assert report["called"] == (8 * 2 * 3 * 2 * 3 + 3 * 2 if TYPES[dtype] in DTYPES else 0)


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason=REASON)
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["block", "none"])
def test_steps_by_kernels_are_as_accurate_as_those_without(checkpointing: str) -> None:
    """In 16 bits; in fp32 those without round as what they are compared with."""
    without, by_kernels = (check_steps(2, "bf16", checkpointing, "1", "off", which) for which in ("off", "on"))
    assert without["called"] == 0 and by_kernels["called"] > 0
    assert by_kernels["gradient"] <= 1.2 * without["gradient"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "dtype", "checkpointing", "view_groups"),
    [(2, "fp32", "block", 1), (1, "fp32", "none", 1), (2, "fp32", "selective", 2), (1, "bf16", "block", 1)],
)
def test_compiled_steps_equal_those_that_are_not(
    world_size: int, dtype: str, checkpointing: str, view_groups: int
) -> None:
    report = check_steps(world_size, dtype, checkpointing, str(view_groups), "on")
    # the student's block with drop-path, and its last one; of a chunk and of what is left, the teacher's block and its
    # last attention; its last MLP. Later steps may compile none.
    assert report["graphs"] == [2 + 2 * 2 + 1, 0]


def check_steps(world_size: int, dtype: str, *arguments: str) -> dict[str, Any]:
    results = run_ranks([SCRIPT, dtype, *arguments], world_size)
    assert [code for code, _, _ in results] == [0] * world_size, results[0][2][-2000:] + results[-1][2][-2000:]
    report: dict[str, Any] = json.loads(results[0][1].splitlines()[-1])
    # accumulation, uneven fragments, two prototype heads
    assert report["gradient"] < (1e-4 if dtype == "fp32" else 0.2)
    assert report["loss"] < (1e-5 if dtype == "fp32" else 0.05)
    # clipped over all ranks
    assert report["moment"] < (1e-4 if dtype == "fp32" else 0.2)
    assert report["norm"] < (1e-5 if dtype == "fp32" else 0.05)
    # the average is fp32 in both number formats, and the network computes from its rounded values
    assert report["ema"] < 1e-6
    assert report["moved"] > 1e-4
    # what takes no part in a step has no gradient, least of all that of an earlier step
    assert report["stale"] == 0.0
    # nor does it matter in which of a step's micro-batches something takes part
    assert report["swapped"] < (1e-5 if dtype == "fp32" else 0.02)
    # of the group of all ranks, and of DeepSpeed's
    assert report["timeouts"] == [123, 123]
    # the student gathers a block for its forward and releases it before the next one
    assert report["live"] <= 3
    # no parameter is gathered twice for one pass
    assert report["gathered"] <= (3.01 if world_size > 1 else 0.0)
    # fragments of few values are padded
    assert report["gathered_of_plan"] == pytest.approx(1.0 if world_size > 1 else 0.0, rel=0.02)
    return report
