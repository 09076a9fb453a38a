"""Training steps on recorded streams: no race on one or two ranks, and few waits of the host.

It runs on a CPU (``streams``); none of it has run on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ordered_steps.py")


def steps_of(ranks: int, *arguments: str) -> dict[str, Any]:
    done = run_ranks([SCRIPT, *arguments], ranks, fresh=True)
    assert all(status == 0 for status, _, _ in done), done[0][2][-3000:]
    found: dict[str, Any] = json.loads(done[0][1].splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [(2, "bf16"), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(1, "bf16"), (2, "fp32"), (1, "fp32")])],
)
def test_steps_have_no_race_and_few_host_waits(ranks: int, dtype: str) -> None:
    found = steps_of(ranks, dtype)
    assert not found["faults"], "\n".join(found["faults"])
    waits = found["waits"][-1]
    # whether the update is applied; losses and stop requests; the gradient norm, when the device has nothing to do
    reads = {place.rpartition(" ")[2]: count for place, count in waits.items() if place.startswith("read ")}
    assert reads == {"is_invalid_grad_norm": 1, "reduce_losses_and_stop_code": 1, "gradient_norms": 2}
    assert not any(place.startswith("device ") for place in waits)
    # the host does not wait for the reductions of a micro-batch
    assert not any("epilogue" in place for place in waits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "fault"),
    [
        # the teacher's shards are gathered while they are written
        ("gathers for writes", " update "), ("for gathers", "read by addmm"), ("for reductions", "stage3.py"),
    ],
)  # fmt: skip
def test_a_missing_wait_is_found(mutant: str, fault: str) -> None:
    faults = steps_of(2, "bf16", mutant)["faults"]
    assert any(fault in each for each in faults), faults
