"""Sharded training of adapters over a frozen base equals the same training without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("lora_steps.py")
# parameters of the embedding, of a block and of the final norm
EMBEDDING, BLOCK, NORM = 5, 14, 2


@pytest.mark.parametrize(
    ("world_size", "checkpointing", "lora", "frozen_blocks"),
    [
        pytest.param(1, "block", {"rank": 4, "alpha": 8}, 3, marks=pytest.mark.slow),
        # the first block needs no backward, the second has adapters, the third trains whole
        (2, "block", {"rank": 4, "blocks": 1, "free_blocks": 1}, 2),
        pytest.param(2, "none", {"rank": 4, "targets": ["qkv"]}, 3, marks=pytest.mark.slow),
        pytest.param(2, "selective", {"rank": 2, "targets": ["proj", "mlp"]}, 3, marks=pytest.mark.slow),
    ],
)
def test_sharded_adapters_equal_unsharded_adapters(
    world_size: int, checkpointing: str, lora: dict[str, object], frozen_blocks: int
) -> None:
    report = train(world_size, "fp32", checkpointing, lora)
    assert report["loss"] < 1e-5
    # relative to the change of each parameter, which AdamW has divided by the root of small gradients
    assert report["master"] < 1e-3 and report["ema"] < 1e-3 and report["anchor"] < 1e-5
    assert report["frozen"] == EMBEDDING + frozen_blocks * BLOCK + NORM


def test_base_is_shared_and_unchanged_in_bf16() -> None:
    report = train(2, "bf16", "block", {"rank": 4})
    assert report["loss"] < 0.2 and report["anchor"] < 0.1


def train(world_size: int, dtype: str, checkpointing: str, lora: dict[str, object]) -> dict[str, Any]:
    results = run_ranks([SCRIPT, dtype, checkpointing, json.dumps(lora)], world_size)
    assert [code for code, _, _ in results] == [0] * world_size, results[0][2][-2000:] + results[-1][2][-2000:]
    report: dict[str, Any] = json.loads(results[0][1].splitlines()[-1])
    assert report["is_base_unchanged"] and report["is_base_shared"]
    # every adapter and head has trained
    assert report["moved"] > 1e-3
    return report
