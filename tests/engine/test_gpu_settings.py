"""The engine settings of a GPU (prefetch, an asynchronous device) give the values of a CPU's settings, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("gpu_settings.py")
# activation checkpointing and groups of views
FORMS = ("none:1", "selective:1", "selective:2", "block:1", "block:2")


def compare_settings(ranks: int, dtype: str, *forms: str) -> None:
    done = run_ranks([SCRIPT, dtype, *forms], ranks)
    assert all(status == 0 for status, _, _ in done), done[0][2][-3000:]
    report = json.loads(done[0][1].splitlines()[-1])
    assert list(report) == list(forms)
    for form, found in report.items():
        # losses, gradient norms, weights, moments and EMA are equal in every bit
        assert not found["differing"] and found["values"] > 100, (form, found)
        # the engine keeps memory for streams, as it does for an asynchronous device
        assert found["calls"] > 0


def test_settings_of_a_gpu_give_the_same_values() -> None:
    compare_settings(2, "bf16", "block:1")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_settings_of_a_gpu_give_the_same_values_in_every_form(ranks: int, dtype: str) -> None:
    compare_settings(ranks, dtype, *FORMS)
